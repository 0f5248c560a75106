"""Fields on the wire: versions, layouts, and what a destination refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corefw_machine_python import PythonMachine

from corefw.errors import RemoteStreamError
from corefw.machine import Device, MachineConfig
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter

Define = Callable[[str], Device]

HEADER = "from corefw_machine_python import guest\nimport time\nclass P(guest.Program):\n"
TICK = "    def tick(self): time.sleep(0.001)\n"


@pytest.fixture
def define(tmp_path: Path) -> Iterator[Define]:
    """Make the device of a program with this body."""
    with contextlib.ExitStack() as stack:

        def define(body: str) -> Device:
            path = tmp_path / f"p{len(list(tmp_path.iterdir()))}.py"
            path.write_text(HEADER + "".join(f"    {line}\n" for line in body.split("; ")) + TICK)
            machine = PythonMachine(MachineConfig(f"{path}:P", incoming=True))
            stack.callback(machine.close)
            return machine.devices()[0]

        yield define


def saved(device: Device) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    device.vmstate.save(writer, device.state)
    writer.flush()
    return bytes(sink.data)


def load(device: Device, data: bytes, version: int) -> None:
    device.vmstate.load(StreamReader(MemorySource(data + b"\0"), where="section"), device.state, version)


def test_the_table_is_named_after_the_class(define: Define) -> None:
    device = define("version = 3; minimum_version = 2; a = guest.field('u16', 515)")
    assert (device.name, device.instance_id) == ("program/P", 0)
    assert (device.vmstate.name, device.vmstate.version_id, device.vmstate.oldest) == ("program/P", 3, 2)
    assert saved(device)[-2:] == b"\x02\x03"


def test_an_older_version_leaves_new_fields_at_their_defaults(define: Define) -> None:
    old = define("a = guest.field('u8', 7)")
    new = define(
        "version = 2; minimum_version = 1; a = guest.field('u8', 1); b = guest.field('str[4]', 'new', since=2)"
    )
    load(new, saved(old), 1)
    assert vars(new.state)["a"] == 7
    assert vars(new.state)["b"] == b"new\0"


def test_a_newer_version_is_refused(define: Define) -> None:
    old, new = define("a = guest.field('u8')"), define("version = 2; a = guest.field('u8')")
    with pytest.raises(RemoteStreamError, match="expected version 1 of 'program/P', got version 2"):
        load(old, saved(new), 2)


@pytest.mark.parametrize(
    "there", ["g = guest.array('g', 8, 'float32')", "g = guest.array('g', (2, 2))", "g = guest.array('h', 4)"]
)
def test_arrays_of_one_size_and_another_shape_are_refused(define: Define, there: str) -> None:
    here = define("g = guest.array('g', 4)")
    load(define("g = guest.array('g', 4)"), saved(here), 1)
    with pytest.raises(
        RemoteStreamError, match=r"expected arrays as they are here .* got other names, shapes or dtypes"
    ):
        load(define(there), saved(here), 1)


@pytest.mark.parametrize(
    ("there", "complaint"),
    [
        (
            "b = guest.field('u32'); a = guest.field('u32')",
            "in a different order: a, b at the source, b, a at the destination",
        ),
        ("a = guest.field('u32')", "'b' is missing at the destination"),
        ("a = guest.field('u32'); b = guest.field('u32'); c = guest.field('u8')", "'c' is missing at the source"),
        (
            "a = guest.field('u32'); c = guest.field('u32')",
            "'b' is missing at the destination; 'c' is missing at the source",
        ),
        ("a = guest.field('u32'); b = guest.field('i32')", "'b' is u32 at the source and i32 at the destination"),
        ("a = guest.field('u32'); b = guest.value()", "'b' is u32 at the source and value[1048576] at the destination"),
    ],
)
def test_other_fields_are_named_and_none_is_loaded(define: Define, there: str, complaint: str) -> None:
    here = define("a = guest.field('u32', 7); b = guest.field('u32', 8)")
    other = define(there)
    before = {name: value for name, value in vars(other.state).items() if name in ("a", "b", "c")}
    with pytest.raises(RemoteStreamError) as caught:
        load(other, saved(here), 1)
    assert caught.value.expected == "the fields that program 'P' has here"
    assert complaint in caught.value.got
    assert "raise `version`" in caught.value.got
    assert before == {name: vars(other.state)[name] for name in before}


def test_a_newer_version_may_have_its_fields_anywhere(define: Define) -> None:
    old = define("a = guest.field('u8', 7); b = guest.field('u8', 8)")
    new = define(
        "version = 2; minimum_version = 1; z = guest.value([1], since=2); a = guest.field('u8')"
        "; y = guest.rng(1, since=2); b = guest.field('u8')"
    )
    load(new, saved(old), 1)
    state = vars(new.state)
    assert (state["a"], state["b"], state["z"]) == (7, 8, b"[1]")
    newer = define(
        "version = 2; minimum_version = 1; z = guest.value([1], since=2); a = guest.field('u8')"
        "; y = guest.rng(2, since=2); b = guest.field('u8')"
    )
    load(newer, saved(new), 2)
    assert vars(newer.state)["y"] == state["y"]


HOSTILE = ["[]", "{}", "[" * 5000, "\xff", "1", '{"program":"P","version":1,"minimum_version":1,"fields":[["a"]]}']


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_list_of_fields(define: Define, text: str) -> None:
    device = define("a = guest.field('u8')")
    data = saved(device)
    at = data.index(b'{"program"')
    raw = text.encode("latin-1")
    hostile = data[: at - 4] + len(raw).to_bytes(4, "big") + raw + data[-1:]
    with pytest.raises(RemoteStreamError, match="expected the layout of program 'P', got "):
        load(device, hostile, 1)


def test_text_that_is_no_text_is_refused(define: Define) -> None:
    device = define("t = guest.field('str[3]')")
    with pytest.raises(RemoteStreamError, match="UTF-8 in field 't'"):
        load(device, saved(device)[:-3] + b"\xff\xfe\xfd", 1)
