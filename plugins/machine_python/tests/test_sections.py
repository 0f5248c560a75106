"""guest.section: an object in a section of its own and in the program's own format moves between engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corefw_machine_python import PythonMachine, guest

from corefw.engine import Engine
from corefw.errors import MachineError, RemoteStreamError, UsageError
from corefw.hookspecs import hookimpl
from corefw.inspection import inspect
from corefw.machine import Machine, MachineConfig, RunState
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.helpers.engines import query_migrate

PROGRAM = '''
import json, time
from corefw_machine_python import guest

class Tree:
    """An object that guest.value would refuse."""

    def __init__(self, leaves=()):
        self.leaves = list(leaves)

    def pack(self):
        return json.dumps(self.leaves).encode()

def unpack(data, version):
    return Tree(json.loads(data) if version > 1 else data.decode().split(","))

class P(guest.Program):
    step = guest.field("u64")
    tree = guest.section(Tree, save=Tree.pack, load=unpack, version=2, minimum_version=1, limit=1 << 16)

    def tick(self):
        self.step += 1
        self.tree.leaves.append(self.step)
        del self.tree.leaves[:-1000]
        time.sleep(0.001)

    def verify(self):
        leaves = self.tree.leaves
        assert leaves == list(range(self.step - len(leaves) + 1, self.step + 1)), (self.step, leaves)
        return {"step": self.step, "leaves": len(leaves)}
'''

Make = Callable[..., Engine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make engines with the program; each of `changes` is a text in it and its replacement."""
    with contextlib.ExitStack() as stack:

        def make(*changes: tuple[str, str], incoming: bool = False) -> Engine:
            text = PROGRAM
            for old, new in changes:
                assert old in text
                text = text.replace(old, new)
            path = tmp_path / f"p{abs(hash(text))}.py"
            path.write_text(text)
            plugins = Plugins.load()
            machine = plugins.machine("python", MachineConfig(f"{path}:P", incoming=incoming))
            engine = stack.enter_context(contextlib.closing(Engine(machine, plugins, plugins.settings())))
            engine.set_capabilities({"return-path": True})
            return engine

        yield make


def migrate(source: Engine, destination: Engine) -> tuple[MigrationStatus, MigrationStatus]:
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    return source.wait_outgoing(60), destination.wait_incoming(60)


def steps(engine: Engine) -> int:
    """Number of steps of a guest; checks that its object agrees."""
    return int(str(engine.verify()["step"]))


def goes_on(engine: Engine, count: int) -> None:
    """Wait until the program has made this many more steps."""
    before = steps(engine)
    assert wait_until(lambda: steps(engine) >= before + count)


MOVED = (MigrationStatus.COMPLETED, MigrationStatus.COMPLETED)
FAILED = (MigrationStatus.FAILED, MigrationStatus.FAILED)


def test_the_object_moves_and_goes_on(make: Make, tmp_path: Path) -> None:
    """Move there and back, and into a file, in which `inspect` shows the section."""
    here, there, back = make(), make(incoming=True), make(incoming=True)
    here.cont()
    for source, destination in ((here, there), (there, back)):
        goes_on(source, 20)
        assert migrate(source, destination) == MOVED
        goes_on(destination, 20)
    back.set_capabilities({"return-path": False})
    back.migrate(f"file:{tmp_path}/stream")
    assert back.wait_outgoing(60) is MigrationStatus.COMPLETED
    seen = inspect(MemorySource((tmp_path / "stream").read_bytes()))
    assert seen.complete, seen.damage
    assert "program/P/tree" in [section.idstr for section in seen.sections]


def test_a_guest_that_is_paused_moves_on_with_what_it_received(make: Make) -> None:
    here, there, beyond = make(), make(incoming=True), make(incoming=True)
    here.cont()
    goes_on(here, 20)
    here.stop()
    step = steps(here)
    assert migrate(here, there) == MOVED
    assert there.machine.run_state is RunState.PAUSED
    assert migrate(there, beyond) == MOVED
    assert steps(beyond) == step
    beyond.cont()
    assert wait_until(lambda: steps(beyond) > step)


def test_a_stop_leaves_the_object_in_place(make: Make) -> None:
    remember = (
        "    def verify(self):",
        "    def after_start(self): self.mine = id(self.tree)\n\n    def verify(self):",
    )
    compare = (
        "        leaves = self.tree.leaves\n",
        "        leaves = self.tree.leaves\n        assert self.mine == id(self.tree)\n",
    )
    engine = make(remember, compare)
    for _ in range(2):
        engine.cont()
        assert wait_until(lambda: steps(engine) > 5)
        engine.stop()
        steps(engine)


def test_a_newer_program_reads_an_older_format(make: Make) -> None:
    older = (
        ("return json.dumps(self.leaves).encode()", "return ','.join(map(str, self.leaves)).encode()"),
        ("version=2, minimum_version=1", "version=1"),
    )
    numbers = ('data.decode().split(",")', 'map(int, data.decode().split(","))')
    here, there = make(*older), make(numbers, incoming=True)
    here.cont()
    goes_on(here, 20)
    assert migrate(here, there) == MOVED
    assert steps(there) > 20


def test_an_older_program_refuses_a_newer_format(make: Make) -> None:
    here, there = make(), make(("version=2, minimum_version=1", "version=1"), incoming=True)
    here.cont()
    goes_on(here, 20)
    assert migrate(here, there) == FAILED
    assert "expected version 1 to 1 of the format of section 'tree', got 2" in query_migrate(here)["error-desc"]
    assert here.machine.run_state is RunState.RUNNING


def test_a_newer_program_may_have_a_section_more(make: Make) -> None:
    new = (
        (
            "    def tick(self):",
            "    version = 2\n    minimum_version = 1\n"
            "    extra = guest.section(list, save=bytes, load=lambda data, _: [*data], since=2)\n\n    def tick(self):",
        ),
        ('return {"step"', 'return {"extra": self.extra, "step"'),
    )
    here, there = make(), make(*new, incoming=True)
    here.cont()
    goes_on(here, 20)
    assert migrate(here, there) == MOVED
    assert there.verify()["extra"] == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            ("return json.dumps(self.leaves).encode()", "1 / (len(self.leaves) < 10); return b''"),
            "section 'tree' cannot be saved: ZeroDivisionError: division by zero (p",
        ),
        (
            ("return json.dumps(self.leaves).encode()", "return b'' if len(self.leaves) < 10 else ''"),
            "returned str, expected bytes",
        ),
        (
            ("return json.dumps(self.leaves).encode()", "return bytes(10_000 * len(self.leaves))"),
            "KiB, its limit is 64.0 KiB",
        ),
    ],
)
def test_an_object_that_cannot_be_saved_stays_and_the_program_runs_on(
    make: Make, change: tuple[str, str], complaint: str, tmp_path: Path
) -> None:
    engine = make(change)
    engine.cont()
    goes_on(engine, 20)
    engine.set_capabilities({"return-path": False})
    engine.migrate(f"file:{tmp_path}/stream")
    assert engine.wait_outgoing(60) is MigrationStatus.FAILED
    assert complaint in query_migrate(engine)["error-desc"]
    assert engine.machine.run_state is RunState.RUNNING
    goes_on(engine, 1)


def test_an_object_that_cannot_be_loaded_stays_at_the_source(make: Make) -> None:
    here, there = make(), make(("return Tree(json.loads(data)", "return Tree(json.loads(data[:-1])"), incoming=True)
    here.cont()
    goes_on(here, 20)
    assert migrate(here, there) == FAILED
    assert "section 'tree' cannot be loaded: json.decoder.JSONDecodeError" in query_migrate(here)["error-desc"]
    assert here.machine.run_state is RunState.RUNNING
    goes_on(here, 1)


def test_a_program_that_cannot_save_its_first_object_does_not_start(make: Make) -> None:
    with pytest.raises(
        MachineError, match="section 'tree' cannot be saved: TypeError: Object of type object is not JSON"
    ):
        make(("self.leaves = list(leaves)", "self.leaves = object()"))


def test_the_bytes_and_what_a_hostile_source_may_send(make: Make) -> None:
    (_, device) = make().machine.devices()
    sink = MemorySink()
    writer = StreamWriter(sink)
    described = device.vmstate.save(writer, device.state)
    writer.flush()
    assert bytes(sink.data) == b"\0\0\0\2" + b"\0\0\0\2" + b"[]", "version, size, what pack() returned"
    assert [row["size"] for row in described["fields"]] == [4, 4, 2]
    there = make(incoming=True).machine.devices()[1]
    for data, complaint in (
        (b"\0\0\0\3\0\0\0\2[]", "expected version 1 to 2 of the format"),
        (b"\0\0\0\2\0\1\0\1[]", "expected a length from 0 to 65536"),
        (b"\0\0\0\2\0\0\0\3[]", "expected 3 bytes of field .tree., got the end of the stream after 2"),
    ):
        with pytest.raises(RemoteStreamError, match=complaint):
            there.vmstate.load(StreamReader(MemorySource(data), where="section"), there.state, 1)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"limit": 0}, "a section's limit is 1 byte to 64.0 MiB, got 0"),
        ({"version": 1, "minimum_version": 2}, r"a section's versions are .*, got \(2, 1\)"),
        ({"save": 3}, "a section's save is a function, got 3"),
    ],
)
def test_wrong_declarations(wrong: dict[str, Any], complaint: str) -> None:
    arguments: dict[str, Any] = {"save": bytes, "load": lambda data, _version: data}
    with pytest.raises((TypeError, ValueError), match=complaint):
        guest.section(list, **arguments | wrong)


def test_a_plugin_sees_the_options_of_the_guest() -> None:
    seen = []

    class Plugin:
        @hookimpl
        def corefw_section_savers(self, machine: Machine) -> None:
            seen.append(dict(machine.options))

    plugins = Plugins.load()
    plugins.register(Plugin(), "curious")
    with contextlib.closing(plugins.machine("python", MachineConfig("stress", {"ram": "1M"}))) as machine:
        assert isinstance(machine, PythonMachine)
        plugins.section_savers(machine, plugins.settings())
    assert seen == [{"ram": "1M"}]
    with pytest.raises(UsageError, match="the program has no option 'colour'"):
        plugins.machine("python", MachineConfig("stress", {"colour": "red"}))
