"""Undeclared state: what is noticed, what does not count, and how a migration is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.errors import BlockedError, MachineError
from corefw.machine import MachineConfig, RunState
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until
from tests.helpers.cli import migfw
from tests.helpers.engines import query_migrate

Make = Callable[..., Engine]

HEAD = """
import collections, decimal, enum, functools, itertools, logging, queue, random, sqlite3, threading, time, types
from dataclasses import dataclass, field
import numpy as np
from corefw_machine_python import guest

@dataclass
class Settings:
    speed: float = 1.0
    names: list = field(default_factory=list)

class Colour(enum.Enum):
    RED = 1

LIMIT, NAMES, TABLE = 10, ["a", "b"], np.arange(10)
HISTORY = []
COUNTER = 0
log = logging.getLogger("heat")

class Sum:
    total = 0

def calls(): pass

def counter():
    n = 0
    def one():
        nonlocal n
        n += 1
        return n
    return one

def glad(): pass
def sad(): pass

counted, space, jobs, mood = counter(), types.SimpleNamespace(n=0), queue.Queue(), sad
add_one, AMOUNTS = functools.partial([].append, 1), [decimal.Decimal(0)]
note = [].append

class Access(enum.Flag):
    READ = 1
    WRITE = 2

class Heat(guest.Program):
    step = guest.field("u64")
    grid = guest.array("grid", 4)
"""
TICK = """
    def tick(self):
        self.step += 1
        time.sleep(0.001)
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make the engine of a program with this body."""
    with contextlib.ExitStack() as stack:

        def make(body: str, *, allow_undeclared: bool = False, only_migratable: bool = False) -> Engine:
            path = tmp_path / "heat.py"
            path.write_text(HEAD + body + ("" if "def tick" in body else TICK))
            plugins = Plugins.load()
            config = MachineConfig(f"{path}:Heat", allow_undeclared=allow_undeclared, only_migratable=only_migratable)
            machine = plugins.machine("python", config)
            stack.callback(machine.close)
            engine = Engine(machine, plugins, plugins.settings())
            stack.callback(engine.close)
            return engine

        yield make


def blocked(engine: Engine) -> list[str]:
    reasons = query_migrate(engine).get("blocked-reasons", [])
    assert isinstance(reasons, list)
    return reasons


def ticked(engine: Engine) -> None:
    """Let the guest make several ticks."""
    first = field_of(engine)
    assert wait_until(lambda: field_of(engine) > first + 2)


def field_of(engine: Engine) -> int:
    engine.machine.stop(RunState.PAUSED)
    value = vars(engine.machine.devices()[0].state)["step"]
    engine.machine.start()
    assert isinstance(value, int)
    return value


STATE = {
    "self.items": "    def setup(self): self.items = []\n",
    "self.limit": "    def setup(self): self.limit = 5\n",
    "self.lock": "    def setup(self): self.lock = threading.Lock()\n",
    "Heat.items": "    items = []\n    def tick(self): self.step += 1; self.items.append(1)\n",
    "Heat.total": "    total = 0\n    def tick(self): self.step += 1; Heat.total += 1\n",
    "self.total": "    total = 0\n    def tick(self): self.step += 1; self.total += 1\n",
    "self.later": "    def tick(self):\n        self.step += 1\n        if self.step > 2: self.later = 1\n",
    "self.settings": "    def __init__(self, options):\n        super().__init__(options); self.settings = Settings()\n"
    "    def tick(self): self.step += 1; self.settings.names.append('x')\n",
    "heat.HISTORY": "    def tick(self): self.step += 1; HISTORY.append(self.step)\n",
    "heat.COUNTER": "    def tick(self):\n        global COUNTER\n        COUNTER += 1; self.step += 1\n",
    "Heat.ids": "    ids = itertools.count()\n    def tick(self): self.step = next(self.ids)\n",
    "Heat.rng": "    rng = random.Random(1)\n    def tick(self): self.step += 1; self.rng.random()\n",
    "Heat.generator": "    generator = np.random.default_rng(1)\n"
    "    def tick(self): self.step += 1; self.generator.random()\n",
    "Heat.table": "    table = np.zeros(3)\n    def tick(self): self.step += 1; self.table[0] += 1\n",
    "Heat.count": "    def count(self, seen=[]): seen.append(1); return len(seen)\n"
    "    def tick(self): self.step = self.count()\n",
    "heat.calls": "    def tick(self): calls.n = getattr(calls, 'n', 0) + 1; self.step += 1\n",
    "heat.counted": "    def tick(self): self.step = counted()\n",
    "heat.Sum": "    def tick(self): Sum.total += 1; self.step += 1\n",
    "heat.space": "    def tick(self): space.n += 1; self.step += 1\n",
    "heat.jobs": "    def tick(self): jobs.put(1); self.step += 1\n",
    "heat.note": "    def tick(self): note(1); self.step += 1\n",
    "heat.add_one": "    def tick(self): add_one(); self.step += 1\n",
    "heat.AMOUNTS": "    def tick(self): AMOUNTS[0] += 1; self.step += 1\n",
    "heat.mood": "    def tick(self):\n        global mood\n        mood = glad; self.step += 1\n",
    "self.saved": "    def before_stop(self): self.saved = 1\n",
}


@pytest.mark.parametrize("name", STATE)
def test_a_migration_is_refused_and_the_guest_runs_on(
    make: Make, name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    engine = make(STATE[name])
    engine.cont()
    ticked(engine)
    expected = (
        f"program 'Heat' has state that would not move: {name} (declare it with guest.field, guest.array, guest.value"
    )
    assert wait_until(lambda: [reason[: len(expected)] for reason in blocked(engine)] == [expected])
    with pytest.raises(BlockedError, match=f"cannot migrate: program 'Heat' has state that would not move: {name} "):
        engine.migrate(f"file:{tmp_path}/stream")
    assert not (tmp_path / "stream").exists()
    ticked(engine)
    warnings = [record.getMessage() for record in caplog.records if "would not move" in record.getMessage()]
    assert len(warnings) == 1, "said once"
    assert "set it in after_start()" in warnings[0]


NO_STATE = {
    "a connection": "    def after_start(self): self.db = sqlite3.connect(':memory:')\n"
    "    def tick(self): self.step += 1; self.db.execute('select 1')\n",
    "a connection that setup() prepares": "    def setup(self): self.db = None\n"
    "    def after_start(self): self.db = sqlite3.connect(':memory:')\n",
    "an assignment of what was there": "    def setup(self): self.db = None\n"
    "    def after_start(self): self.db = None\n",
    "a connection that before_stop() closes": "    db = None\n"
    "    def after_start(self): self.db = sqlite3.connect(':memory:')\n"
    "    def before_stop(self): self.db.close(); self.db = None\n",
    "what before_stop() deletes": "    def tick(self): self.step += 1; self.cache = [1]\n"
    "    def before_stop(self):\n        if hasattr(self, 'cache'): del self.cache\n",
    "what after_start() made and tick() changes": "    def after_start(self): self.log = []\n"
    "    def tick(self): self.step += 1; self.log.append(1)\n",
    "threads and locks": "    def after_start(self):\n"
    "        self.lock, self.stop = threading.Lock(), threading.Event()\n"
    "        self.thread = threading.Thread(target=self.stop.wait); self.thread.start()\n"
    "    def before_stop(self): self.stop.set(); self.thread.join()\n"
    "    def tick(self):\n"
    "        with self.lock: self.step += 1\n",
    "cached properties": "    @functools.cached_property\n    def table(self): return [1, 2, 3]\n"
    "    def tick(self): self.step += len(self.table)\n",
    "cached methods": "    @functools.lru_cache(maxsize=None)\n    def square(self, n): return n * n\n"
    "    @staticmethod\n    @functools.cache\n    def cube(n): return n ** 3\n"
    "    def tick(self): self.step += 1; self.square(self.step); self.cube(self.step)\n",
    "a logger": "    log = logging.getLogger('x')\n"
    "    def tick(self): self.step += 1; self.log.debug('step'); log.info('step')\n",
    "constants": "    limit: int = 5\n    names = ['a']\n    settings = Settings()\n"
    "    colours = {c: c.name for c in Colour}\n"
    "    def tick(self): self.step += self.limit + len(NAMES) + int(TABLE[1]) + len(self.settings.names)\n",
    "flags that are combined": "    def tick(self): self.step += (Access.READ | Access.WRITE).value\n",
    "functions that are made again": "    def tick(self):\n        global mood\n"
    "        mood = (lambda: None) if self.step < 0 else mood; self.step += counter()()\n",
    "properties": "    @property\n    def double(self): return 2 * self.step\n"
    "    def tick(self): self.step += 1; self.double\n",
    "what __init__() makes": "    def __init__(self, options):\n"
    "        super().__init__(options); self.table = list(range(100)); self.lock = threading.Lock()\n",
    "a registry that after_start() fills": "    handlers = []\n"
    "    def after_start(self): self.handlers.append(print)\n",
    "a global that after_start() opens": "    def after_start(self):\n"
    "        global COUNTER\n        COUNTER = object()\n",
    "views of arrays": "    def after_start(self): self.inner = self.grid[1:-1]\n"
    "    def tick(self): self.step += 1; self.inner += 1; self.grid += 1\n",
}


@pytest.mark.parametrize("what", NO_STATE)
def test_no_false_alarm(make: Make, what: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    engine = make(NO_STATE[what])
    engine.cont()
    ticked(engine)
    assert blocked(engine) == []
    engine.migrate(f"file:{tmp_path}/stream")
    assert engine.wait_outgoing(60) is MigrationStatus.COMPLETED, query_migrate(engine)
    assert [record.getMessage() for record in caplog.records if "would not move" in record.getMessage()] == []


def test_state_that_appears_while_the_migration_runs_stops_it_and_not_the_guest(make: Make, tmp_path: Path) -> None:
    """The last check is after before_stop(), before the guest is handed over."""
    engine = make("    def before_stop(self): self.saved = 1\n    def after_start(self): self.open = True\n")
    engine.cont()
    assert blocked(engine) == []
    engine.migrate(f"file:{tmp_path}/stream")
    assert engine.wait_outgoing(60) is MigrationStatus.FAILED
    assert "state that would not move: self.saved (" in query_migrate(engine)["error-desc"]
    assert engine.machine.run_state == "running"
    ticked(engine)


def test_those_who_know_can_move_all_the_same(make: Make, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    engine = make(STATE["self.total"], allow_undeclared=True)
    engine.cont()
    ticked(engine)
    assert wait_until(lambda: blocked(engine) == [] and "self.total" in caplog.text), "it is still said"
    engine.migrate(f"file:{tmp_path}/stream")
    assert engine.wait_outgoing(60) is MigrationStatus.COMPLETED


@pytest.mark.parametrize("name", ["self.items", "self.total"])
def test_only_migratable_ends_the_guest_at_its_beginning(make: Make, name: str) -> None:
    engine = make(STATE[name], only_migratable=True)
    with contextlib.suppress(MachineError):
        engine.cont()
    assert wait_until(lambda: engine.machine.run_state is RunState.INTERNAL_ERROR)
    error = str(engine.machine.information()["error"])
    assert error.startswith(
        f"only-migratable was asked for, but program 'Heat' has state that would not move: {name} ("
    )
    assert "Undeclared" not in error


def test_the_command_line(tmp_path: Path) -> None:
    program = tmp_path / "heat.py"
    program.write_text(HEAD + STATE["self.items"] + "    def tick(self): self.finish()\n")
    said = "migfw: program 'Heat' has state that would not move: self.items ("
    for arguments, status, line in (
        ((), 0, said),
        (("--allow-undeclared",), 0, said),
        (
            ("--only-migratable",),
            1,
            "migfw: the guest has ended: only-migratable was asked for, but program 'Heat' has ",
        ),
    ):
        done = migfw("run", f"{program}:Heat", *arguments, runtime=tmp_path)
        assert (done.returncode, done.stderr.count("would not move")) == (status, 1), done.stderr
        assert line in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_a_look_at_a_slow_guest_does_not_wait_for_its_tick(make: Make, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    engine = make(f"    def tick(self): open({str(begun)!r}, 'w').close(); threading.Event().wait()\n")
    engine.cont()
    assert wait_until(begun.exists)
    assert blocked(engine) == [], "it answers while the tick goes on for ever"
