"""The layout of a program is compared before any RAM is sent; a refusal says what differs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from corefw_machine_python import PythonMachine, requirements
from corefw_machine_python.layout import Layout, compare
from corefw_machine_python.layoutsection import LayoutLoader, LayoutSaver

from corefw.channel import Interrupt
from corefw.engine import Engine
from corefw.errors import RemoteStreamError, StreamError, UsageError
from corefw.inspection import inspect
from corefw.machine import MachineConfig
from corefw.memory import pagemap
from corefw.plugins import Plugins
from corefw.settings import Settings
from corefw.states import MigrationStatus
from corefw.testing.recording import KitContext
from corefw.testing.section import SectionCase, check_section
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.helpers.engines import query_migrate

Make = Callable[..., PythonMachine]

HEADER = "from corefw_machine_python import guest\nimport time\nclass P(guest.Program):\n"
TICK = "    def tick(self): time.sleep(0.001)\n"
HERE = "big = guest.array('big', 4 << 20, 'u1'); a = guest.field('u32'); b = guest.field('u32')"

PYTHON = sys.version.split()[0]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make(body: str, *, incoming: bool = False) -> PythonMachine:
            path = tmp_path / f"p{len(list(tmp_path.iterdir()))}.py"
            path.write_text(HEADER + "".join(f"    {line}\n" for line in body.split("; ")) + TICK)
            machine = PythonMachine(MachineConfig(f"{path}:P", incoming=incoming))
            stack.callback(machine.close)
            return machine

        yield make


def moved(source: PythonMachine, destination: PythonMachine) -> tuple[int, str | None]:
    """Bytes of RAM that were sent, and the error."""
    plugins = Plugins.load()
    here = Engine(source, plugins, plugins.settings())
    there = Engine(destination, plugins, plugins.settings())
    with contextlib.closing(here), contextlib.closing(there):
        here.cont()
        # So slow that the answer arrives long before all of the RAM is sent.
        here.set_parameters({"max-bandwidth": 1 << 20})
        here.set_capabilities({"return-path": True})
        here.migrate(there.migrate_incoming("tcp:127.0.0.1:0"))
        status = there.wait_incoming(60)
        here.wait_outgoing(60)
        error = query_migrate(there).get("error-desc")
        assert (status is MigrationStatus.FAILED) == (error is not None)
        if error is not None:
            assert here.machine.run_state == "running", "the guest runs on where it was"
            assert error.removeprefix("load of migration failed: ") in query_migrate(here)["error-desc"]
        return int(np.asarray(destination.ram_blocks()[0].pages).any()), error


@pytest.mark.parametrize(
    ("there", "complaint"),
    [
        (
            HERE.replace("a = ", "z = "),
            "this program has different fields: 'a' is missing at the destination; 'z' is missing at the source (",
        ),
        (
            "big = guest.array('big', 4 << 20, 'u1'); b = guest.field('u32'); a = guest.field('u32')",
            "this program has different fields: they are in a different order:"
            " a, b at the source, b, a at the destination (raise `version`",
        ),
        (
            HERE.replace("4 << 20, 'u1'", "1 << 20, 'i4'"),
            "this program has different arrays:"
            " 'big' is (4194304,) of uint8 at the source and (1048576,) of int32 at the destination (give both",
        ),
        (HERE + "; version = 2", "the destination's program takes over version 2, the source's is version 1"),
    ],
)
def test_what_differs_is_refused_before_any_ram_came(make: Make, there: str, complaint: str) -> None:
    source = make(HERE + "; def setup(self): self.big[:] = 1")
    came, error = moved(source, make(there, incoming=True))
    assert error is not None
    assert complaint in error
    assert not came


def test_an_older_version_is_taken_over(make: Make) -> None:
    newer = "version = 2; minimum_version = 1; x = guest.value([], since=2); "
    assert moved(make(HERE), make(newer + HERE, incoming=True))[1] is None


# -- requirements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requires", "complaint"),
    [
        ("{'numpy': '>=99'}", f"program 'P' requires numpy >=99, and numpy is {np.__version__}"),
        ("{'python': '>=3.11,<3.11'}", f"program 'P' requires python >=3.11,<3.11, and python is {PYTHON}"),
        ("{'no-such-thing': '>=1'}", "program 'P' requires no-such-thing >=1, and no-such-thing is not installed"),
        ("{'numpy': 'new'}", "program 'P': requires: 'new' is not a requirement: expected one like >=1.26, or same"),
    ],
)
def test_a_program_whose_requirements_do_not_hold_does_not_start(make: Make, requires: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        make(f"requires = {requires}")
    assert str(caught.value) == complaint


@pytest.mark.parametrize(
    ("version", "requirement", "holds"),
    [
        ("1.26.4", ">=1.26", True),
        ("1.26", ">=1.26.0", True),
        ("1.26.4rc1", "==1.26.4", True),
        ("2.1", ">=1.26, <2", False),
        ("10.0", ">9", True),
        ("x", ">=1", False),
        ("1", "same", True),
    ],
)
def test_requirements(version: str, requirement: str, holds: bool) -> None:
    assert requirements.satisfied(version, requirement) is holds


def layout(**changes: object) -> Layout:
    plain = Layout("P", 1, 1, (("a", "u8", 0),), {}, {}, {"python": "3.11.2", "numpy": "1.26.0", "migfw": "0.2"})
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]  # as the tests below give them


def test_other_versions_are_a_note_and_refused_only_where_the_program_says_so() -> None:
    there = {"python": "3.12.1", "numpy": "2.1.0", "migfw": "0.2"}
    assert compare(layout(), layout(versions=there)).refusals == ()
    assert compare(layout(), layout(versions=there)).notes == (
        "Python is 3.12.1 at the source and 3.11.2 at the destination",
        "NumPy is 2.1.0 at the source and 1.26.0 at the destination",
    )
    (_, numpy) = compare(layout(fields=(("r", "rng[numpy]", 0),)), layout(versions=there)).notes
    assert "a generator keeps its state" in numpy
    (same,) = compare(layout(), layout(versions=there, requires={"numpy": "same"})).refusals
    assert same == "the program requires the same numpy on both sides: 2.1.0 at the source, 1.26.0 at the destination"
    (newer,) = compare(layout(), layout(requires={"numpy": ">=99"})).refusals
    assert newer == f"the source's program requires numpy >=99, and numpy is {np.__version__} at the destination"
    patch = {"python": "3.11.9", "numpy": "1.26.4", "migfw": "0.2"}
    assert compare(layout(), layout(versions=patch)).notes == ()


# -- the section -------------------------------------------------------------------------------------------------------


def body(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


def load(data: bytes) -> None:
    LayoutLoader(layout()).load(StreamReader(MemorySource(data), where="section"), 1)


def test_the_section_as_bytes() -> None:
    sink = MemorySink()
    writer = StreamWriter(sink)
    LayoutSaver(layout()).setup(writer, KitContext(Settings(), Interrupt()))
    writer.flush()
    data = bytes(sink.data)
    assert data == body(layout().pack())
    assert json.loads(data[4:])["fields"] == [["a", "u8", 0]]
    load(data)


GOOD = json.loads(layout().pack())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        *(json.dumps(GOOD | {name: None}).encode() for name in GOOD),
        *(json.dumps(GOOD | {name: [1]}).encode() for name in GOOD),
        json.dumps(GOOD | {"arrays": {"a": 1}}).encode(),
        json.dumps(GOOD | {"version": True}).encode(),
    ],
)
def test_a_hostile_section(text: bytes) -> None:
    with pytest.raises(RemoteStreamError, match="expected what a program consists of, got "):
        load(body(text))


def test_a_section_that_claims_too_much() -> None:
    with pytest.raises(RemoteStreamError, match="at most 1048576 bytes of the layout"):
        load(b"\xff\xff\xff\xff")


def test_requirements_of_a_hostile_source() -> None:
    for hostile in ("x" * 1000, ">=" + "9" * 100_000, "=="):
        with pytest.raises(StreamError):
            load(body(layout(requires={"numpy": hostile}).pack()))


@pytest.mark.parametrize(
    ("body", "cost"),
    [
        ("def before_stop(self): time.sleep(0.3)", r"took [\d.]+ m?s"),
        ("def before_stop(self): self.big[:] = self.big[0] + 1", r"took [\d.]+ m?s and wrote 4.0 MiB"),
    ],
)
def test_a_stop_that_before_stop_makes_too_long_is_said(
    make: Make, body: str, cost: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    if "wrote" in cost and (reason := pagemap.unsupported()):
        pytest.skip(f"PAGEMAP_SCAN: {reason}")
    machine = make("big = guest.array('big', 4 << 20, 'u1'); " + body)
    plugins = Plugins.load()
    engine = Engine(machine, plugins, plugins.settings())
    with contextlib.closing(engine):
        engine.set_parameters({"downtime-limit": 1})
        engine.cont()
        engine.migrate(f"file:{tmp_path}/stream")
        assert engine.wait_outgoing(60) is MigrationStatus.COMPLETED
        assert re.fullmatch(cost, str(machine.information()["before-stop"]))
    (said,) = [record.getMessage() for record in caplog.records if "downtime-limit" in record.getMessage()]
    assert re.match(rf"the guest was stopped for [\d.]+ m?s, downtime-limit is 1 ms: its before_stop\(\) {cost}", said)


def test_the_contract_kit() -> None:
    check_section(
        SectionCase(
            saver=lambda: LayoutSaver(layout()),
            loader=lambda: LayoutLoader(layout()),
            state=lambda section: section.layout,
        )
    )


def test_a_stored_guest_can_be_inspected(make: Make, tmp_path: Path) -> None:
    """The section precedes the RAM, which `inspect` does not hold in memory, whatever its size."""
    machine = make(HERE)
    plugins = Plugins.load()
    engine = Engine(machine, plugins, plugins.settings())
    with contextlib.closing(engine):
        engine.cont()
        engine.migrate(f"file:{tmp_path}/stream")
        assert engine.wait_outgoing(60) is MigrationStatus.COMPLETED
    seen = inspect(MemorySource((tmp_path / "stream").read_bytes()))
    assert seen.complete, seen.damage
    assert [(one.type, one.idstr) for one in seen.sections[:2]] == [("start", "program-layout"), ("start", "ram")]
    assert seen.blocks["big"].sent > 0
