"""guest.value and guest.rng: what they hold, how they are sent, and what is refused on either side."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corefw_machine_python import PythonMachine, guest, jsonlike
from hypothesis import given
from hypothesis import strategies as st

from corefw.engine import Engine
from corefw.errors import BlockedError, MachineError, RemoteStreamError
from corefw.machine import MachineConfig, RunState
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.helpers.engines import query_migrate

LIMIT = 1 << 20

HEAD = """
import random, time
import numpy as np
from corefw_machine_python import guest

class P(guest.Program):
    step = guest.field("u64")
"""
TICK = """
    def tick(self):
        self.step += 1
        time.sleep(0.001)
"""

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(1 << 20000), max_value=1 << 20000)
    | st.floats(allow_nan=False)
    | st.text()
    | st.text().map(lambda text: "$" + text)
    | st.binary()
)
KEYS = st.text() | st.sampled_from(["$", "$$", "$bytes", "$$tuple"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


def types(value: Any) -> Any:
    """The value with every type, because 1 == True == 1.0."""
    if isinstance(value, list | tuple):
        return (type(value), [types(inner) for inner in value])
    if isinstance(value, dict):
        return (dict, [(key, types(inner)) for key, inner in value.items()])
    return (type(value), repr(value) if isinstance(value, float) else value)


@given(VALUES)
def test_a_value_arrives_as_it_was(value: object) -> None:
    text = jsonlike.encode(value, LIMIT)
    assert text.isascii()
    assert types(jsonlike.decode(text)) == types(value)


def test_floats_that_json_does_not_have() -> None:
    arrived = jsonlike.decode(jsonlike.encode([math.inf, -math.inf, math.nan, -0.0, 5e-324], LIMIT))
    assert arrived[:2] == [math.inf, -math.inf]
    assert math.isnan(arrived[2])
    assert math.copysign(1, arrived[3]) == -1
    assert arrived[4] == 5e-324


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"a": [1, {2}]}, "value 'items'['a'][1] is of type set: use a dict with True as values, or a sorted list"),
        ({1: "x"}, "value 'items' has the key 1 of type int: keys are str"),
        (np.zeros(3), "value 'items' is of type ndarray: use guest.array for arrays, or .tolist()"),
        ([np.int64(3)], r"value 'items'[0] is of type int64: use .item()"),
        (object(), "value 'items' is of type object: expected dict, list, tuple, str, int, float, bool, None or bytes"),
        (LOOP, "value 'items' is nested deeper than 100 levels, or contains itself"),
        ("x" * 2046, "value 'items' has 2.0 KiB, its limit is 1.0 KiB (keep less in it, or give it a larger limit=)"),
        ("x" * 9000, "value 'items' has more than 8.0 KiB, its limit is 1.0 KiB"),
    ],
)
def test_what_has_no_place_in_a_value_is_refused_where_it_is_assigned(value: object, complaint: str) -> None:
    class P(guest.Program):
        items = guest.value([], limit=1024)

    program = P(guest.Options({}))
    with pytest.raises((TypeError, ValueError)) as caught:
        program.items = value
    assert str(caught.value).startswith(complaint)
    assert program.items == []


def test_a_default_is_each_programs_own() -> None:
    class P(guest.Program):
        items = guest.value({"list": []})

    one, two = P(guest.Options({})), P(guest.Options({}))
    one.items["list"].append(1)
    assert two.items == {"list": []}
    with pytest.raises(TypeError, match="a value's default is of type set"):
        guest.value({1})


# -- what arrives may be anything --------------------------------------------------------------------------------------


@given(st.binary() | st.text().map(str.encode) | VALUES.map(lambda value: jsonlike.encode(value, LIMIT).encode()[:-1]))
def test_any_text_is_a_value_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        jsonlike.decode(data)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 101 + "1" + "}" * 101,
        "1" * 100_000,
        "NaN",
        '{"$float":"1"}',
        '{"$bytes":"?"}',
        '{"$tuple":1}',
        '{"$other":"x"}',
        '{"$int":"x","a":1}',
        '{"a":1,"a":2}',
    ],
)
def test_hostile_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        jsonlike.decode(text)


Make = Callable[..., PythonMachine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make machines whose program has this body."""
    with contextlib.ExitStack() as stack:

        def make(body: str, *, incoming: bool = False) -> PythonMachine:
            path = tmp_path / f"p{abs(hash(body))}.py"
            path.write_text(HEAD + "".join(f"    {line}\n" for line in body.split("; ")))
            if "def tick" not in body:
                path.write_text(path.read_text() + TICK)
            machine = PythonMachine(MachineConfig(f"{path}:P", incoming=incoming))
            stack.callback(machine.close)
            return machine

        yield make


def saved(machine: PythonMachine) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    (device,) = machine.devices()
    device.vmstate.save(writer, device.state)
    writer.flush()
    return bytes(sink.data)


def load(machine: PythonMachine, data: bytes) -> None:
    (device,) = machine.devices()
    device.vmstate.load(StreamReader(MemorySource(data + b"\0"), where="section"), device.state, 1)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (b"[1,2]", b"[1,2[", "expected a value[64] in field 'items', got no JSON in ASCII"),
        (b"\0\0\0\x05[1,2]", b"\0\0\0\x41" + b"[" * 65, "expected a length from 0 to 64 for field 'items'"),
        (b"\0\0\0\x05[1,2]", b"\xff\xff\xff\xff[1,2]", "expected a length from 0 to 64 for field 'items'"),
        (b'"PCG64"', b'"PCG65"', r"expected a rng\[numpy\] in field 'rng', got no state of a generator"),
    ],
)
def test_a_hostile_stream(make: Make, old: bytes, new: bytes, complaint: str) -> None:
    body = "items = guest.value([1, 2], limit=64); rng = guest.rng(1)"
    data = saved(make(body))
    assert data.count(old) == 1
    with pytest.raises(RemoteStreamError, match=complaint.replace("value[64]", r"value\[64\]")):
        load(make(body, incoming=True), data.replace(old, new))


def test_the_description_has_the_sizes(make: Make) -> None:
    (device,) = make("items = guest.value([1, 2])").devices()
    described = device.vmstate.save(StreamWriter(MemorySink()), device.state)
    rows = {row["name"]: (row["type"], row["size"]) for row in described["fields"]}
    assert rows["items.size"] == ("uint32", 4)
    assert rows["items"] == ("buffer", len("[1,2]"))


# -- a life with them --------------------------------------------------------------------------------------------------


def facts(machine: PythonMachine, name: str) -> object:
    shown = machine.information()[name]
    assert isinstance(shown, dict)
    return shown


def engine_of(machine: PythonMachine) -> Engine:
    plugins = Plugins.load()
    return Engine(machine, plugins, plugins.settings())


def test_they_move_and_go_on(make: Make) -> None:
    body = (
        "items = guest.value([])"
        "; numbers = guest.value({'big': 1 << 200, 'raw': b'\\x00\\xff', 'inf': float('inf')})"
        "; numpy = guest.rng(3)"
        "; python = guest.rng(4, kind='random')"
        "; def tick(self):"
        ";     self.step += 1"
        ";     time.sleep(0.0005)"
        ";     self.items.append(self.numpy.random() + self.python.gauss(0, 1) + self.number())"
        ";     del self.items[:-50]"
        "; def number(self): return int(self.numpy.integers(9, dtype='u4'))"
        "; def verify(self): return {'step': self.step, 'items': self.items, 'numbers': repr(self.numbers)}"
    )
    source, destination = make(body), make(body, incoming=True)
    here, there = engine_of(source), engine_of(destination)
    with contextlib.closing(here), contextlib.closing(there):
        here.cont()
        assert wait_until(lambda: int(str(source.verify()["step"])) > 20)
        here.migrate(there.migrate_incoming("tcp:127.0.0.1:0"))
        assert there.wait_incoming(60) is MigrationStatus.COMPLETED
        assert here.wait_outgoing(60) is MigrationStatus.COMPLETED
        moved_at = vars(source.devices()[0].state)["step"]
        assert wait_until(lambda: int(str(destination.verify()["step"])) > moved_at + 20)
        end = destination.verify()
    numpy, python = np.random.default_rng(3), random.Random(4)
    expected = [
        numpy.random() + python.gauss(0, 1) + int(numpy.integers(9, dtype="u4")) for _ in range(int(str(end["step"])))
    ]
    assert end["items"] == expected[-50:]
    assert end["numbers"] == repr({"big": 1 << 200, "raw": b"\x00\xff", "inf": math.inf})


def test_a_stop_on_one_host_leaves_the_objects_in_place(make: Make) -> None:
    machine = make(
        "items = guest.value([]); rng = guest.rng(1)"
        "; def after_start(self): self.mine = getattr(self, 'mine', (self.items, self.rng))"
        "; def verify(self): return {'same': self.mine[0] is self.items and self.mine[1] is self.rng}"
    )
    for _ in range(2):
        machine.start()
        machine.stop(RunState.PAUSED)
    machine.start()
    assert machine.verify() == {"same": True}


def test_status_shows_values_and_sizes(make: Make) -> None:
    machine = make("small = guest.value({'a': 1}); large = guest.value('x' * 5000); rng = guest.rng(1)")
    for start in (False, True):
        if start:
            machine.start()
        fields, sizes = facts(machine, "fields"), facts(machine, "value-sizes")
        assert isinstance(fields, dict)
        assert (fields["small"], fields["large"]) == ('{"a":1}', "a value of 4.9 KiB")
        assert fields["rng"] == "a generator (numpy)"
        assert isinstance(sizes, dict)
        assert {name: size for name, size in sizes.items() if name != "rng"} == {"small": 7, "large": 5002}


@pytest.mark.parametrize(
    ("grow", "complaint"),
    [
        ("self.items.append('x' * 100)", "value 'items' has .* its limit is 1.0 KiB"),
        ("self.items.append({1})", r"value 'items'\[0\] is of type set"),
    ],
)
def test_a_value_that_cannot_move_is_refused_and_the_guest_runs_on(
    make: Make, grow: str, complaint: str, tmp_path: Path
) -> None:
    machine = make(
        f"items = guest.value([], limit=1024); def tick(self):;     self.step += 1;     time.sleep(0.001);     {grow}"
    )
    engine = engine_of(machine)
    with contextlib.closing(engine):
        engine.cont()
        assert wait_until(lambda: bool(query_migrate(engine).get("blocked-reasons")))
        with pytest.raises(BlockedError, match=f"cannot migrate: program 'P': {complaint}"):
            engine.migrate(f"file:{tmp_path}/x")
        with pytest.raises(MachineError, match=complaint):
            machine.stop(RunState.FINISH_MIGRATE)
        assert machine.run_state is RunState.RUNNING
