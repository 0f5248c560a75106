"""A parked machine: its options, what it refuses, and streams of a real QEMU that come out as they went in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from corefw_machine_qemu import ParkedMachine

from corefw.engine import Engine
from corefw.errors import BlockedError, MachineError, UsageError
from corefw.inspection import inspect
from corefw.machine import MachineConfig, ParkingMachine, RamMakingMachine, RunState
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.wire import items
from corefw.wire.constants import Command, SectionType
from corefw.wire.decoder import decode
from corefw.wire.stream import MemorySource, StreamReader
from tests.golden.record import RECORDINGS, load
from tests.helpers.engines import query_migrate

PATIENCE = 60.0
TAKEN = [name for name in RECORDINGS if name not in ("pc-postcopy", "pc-compress", "pc-xbzrle", "pc-return-path")]
"""Recordings that load from a file. A return path needs a connection; other tests cover postcopy and encoded pages."""


def machine(**options: str) -> ParkedMachine:
    return ParkedMachine(MachineConfig(options=options, incoming=True))


# -- the machine itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MachineConfig(), "say where to wait with --incoming URI"),
        (MachineConfig(program="x.py", incoming=True), "does not run a program, got 'x.py'"),
        (MachineConfig(allow_undeclared=True, incoming=True), "leave --allow-undeclared out"),
        (MachineConfig(options={"ram": "1G"}, incoming=True), "no option 'ram': expected ram-limit, block-limit"),
        (MachineConfig(options={"ram-limit": "much"}, incoming=True), "'ram-limit': 'much' is not a size"),
        (MachineConfig(options={"ram-limit": "0"}, incoming=True), "at least one page"),
        (MachineConfig(options={"block-limit": "-1"}, incoming=True), "'block-limit': expected a number above zero"),
    ],
)
def test_wrong_usage_is_refused(config: MachineConfig, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        ParkedMachine(config)


def test_it_is_what_the_engine_asks_for() -> None:
    parked = machine()
    assert isinstance(parked, ParkingMachine)
    assert isinstance(parked, RamMakingMachine)
    assert (parked.kind, parked.name, parked.run_state) == ("qemu", "", RunState.INMIGRATE)
    assert parked.stored_format() is None
    assert json.loads(json.dumps(parked.information()))["parked"] is False
    parked.close()
    parked.close()


def test_it_does_not_run() -> None:
    parked = machine()
    seen: list[tuple[RunState, RunState]] = []
    parked.watch(lambda old, new: seen.append((old, new)))
    for start in (parked.start, lambda: parked.set_run_state(RunState.RUNNING)):
        with pytest.raises(MachineError, match="cannot run here"):
            start()
    parked.stop(RunState.PAUSED)
    parked.set_run_state(RunState.PAUSED)
    assert seen == [(RunState.INMIGRATE, RunState.PAUSED)]


def test_ram_has_a_limit() -> None:
    parked = machine(**{"ram-limit": "1M"})
    try:
        with pytest.raises(MachineError, match=r"cannot make 1\.0 MiB of RAM: more than the 1\.0 MiB allowed"):
            parked.make_ram_blocks({"pc.ram": 1 << 19, "more": (1 << 19) + 4096})
        with pytest.raises(MachineError, match="expected a multiple of 4096 bytes, got 5000"):
            parked.make_ram_blocks({"pc.ram": 4096, "odd": 5000})
        with pytest.raises(MachineError, match=r"'pc\\x00ram': expected a printable name"):
            parked.make_ram_blocks({"pc\0ram": 4096})
        assert not parked.ram_blocks()
        (block,) = parked.make_ram_blocks({"pc.ram": 1 << 19})
        assert block in parked.ram_blocks()
    finally:
        parked.close()


# -- streams in and out ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def parking() -> Iterator[Engine]:
    plugins = Plugins.load()
    engine = Engine(plugins.machine("qemu", MachineConfig(incoming=True)), plugins, plugins.settings())
    try:
        yield engine
    finally:
        engine.close()


def take_in(engine: Engine, data: bytes, folder: Path) -> MigrationStatus:
    path = folder / "in"
    path.write_bytes(data)
    engine.migrate_incoming(f"file:{path}")
    return engine.wait_incoming(PATIENCE)


def devices(data: bytes) -> bytes:
    """Everything from the first device section on."""
    for item in decode(StreamReader(MemorySource(data))):
        if isinstance(item, items.Uncut) or (isinstance(item, items.Section) and item.header.type is SectionType.FULL):
            return data[item.offset :]
    raise AssertionError("no device")


def memory(data: bytes) -> dict[tuple[str, int], bytes]:
    """The final contents of every page that is not zero."""
    pages = {}
    for item in decode(StreamReader(MemorySource(data))):
        if isinstance(item, items.Ram) and item.block is not None:
            body = item.record.body
            pages[item.block, item.record.address] = body if len(body) > 1 else body * 4096
    return {place: page for place, page in pages.items() if any(page)}


@pytest.mark.parametrize("name", TAKEN)
def test_a_stream_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    data = load(name)
    with parking() as engine:
        engine.set_capabilities({"dirty-bitmaps": bool(RECORDINGS[name].bitmaps)})
        assert take_in(engine, data, tmp_path) is MigrationStatus.COMPLETED, query_migrate(engine)
        engine.migrate(f"file:{tmp_path}/out")
        assert engine.wait_outgoing(PATIENCE) is MigrationStatus.COMPLETED, query_migrate(engine)
    sent = (tmp_path / "out").read_bytes()
    assert devices(sent) == devices(data)
    assert memory(sent) == memory(data)
    before, after = inspect(MemorySource(data)), inspect(MemorySource(sent))
    assert after.complete
    assert after.configuration == before.configuration
    assert after.footers == before.footers
    assert {name: block.entry for name, block in after.blocks.items()} == {
        name: block.entry for name, block in before.blocks.items()
    }
    assert sorted(map(repr, after.bitmaps)) == sorted(map(repr, before.bitmaps))


def test_bitmaps_are_not_left_behind(tmp_path: Path) -> None:
    with parking() as engine:
        assert take_in(engine, load("pc-bitmaps"), tmp_path) is MigrationStatus.COMPLETED
        fine = {"node": "disk", "name": "fine", "dirty": (128 << 10) + 512, "inconsistent": False}
        assert fine in engine.machine.information()["bitmaps"]  # type: ignore[operator]
        with pytest.raises(BlockedError, match="'disk/fine', 'disk/off' would be lost"):
            engine.migrate(f"file:{tmp_path}/out")


@pytest.mark.parametrize("name", ["pc-compress", "pc-xbzrle", "pc-postcopy", "pc-return-path"])
def test_what_nobody_here_reads_is_refused(name: str, tmp_path: Path) -> None:
    with parking() as engine:
        assert take_in(engine, load(name), tmp_path) is MigrationStatus.FAILED
        assert "offset" in query_migrate(engine)["error-desc"]


@pytest.mark.parametrize("end", [0, 7, 30, 200, 5000, 23000, 24000, 36000, 36400, 100_000, 136_040])
def test_a_truncated_stream_fails_with_its_offset(end: int, tmp_path: Path) -> None:
    with parking() as engine:
        assert take_in(engine, load("pc")[:end], tmp_path) is MigrationStatus.FAILED
        assert "offset" in query_migrate(engine)["error-desc"]
        assert engine.machine.run_state is RunState.INMIGRATE


def test_status_names_what_is_parked(tmp_path: Path) -> None:
    with parking() as engine:
        take_in(engine, load("pc"), tmp_path)
        shown = json.loads(json.dumps(engine.machine.information()))
        assert shown["machine"] == "pc-i440fx-7.2"
        assert shown["parked"]
        assert shown["ram"]["pc.ram"] == 1 << 20
        assert {"name": "timer", "instance-id": 0, "version": 2, "size": 48} in shown["devices"]
        with pytest.raises(MachineError, match="cannot run here"):
            engine.cont()


# -- SWITCHOVER_START --------------------------------------------------------------------------------------------------

SWITCHOVER_START = bytes((SectionType.COMMAND, 0, Command.SWITCHOVER_START, 0, 0))


def end_of_ram(data: bytes) -> int:
    """The offset of the RAM's END section."""
    found = decode(StreamReader(MemorySource(data)))
    return next(item.offset for item in found if isinstance(item, items.Part) and item.type is SectionType.END)


@pytest.mark.parametrize("announced", [True, False])
def test_switchover_start_goes_out_only_where_it_came(announced: bool, tmp_path: Path) -> None:
    """Machine types from 10.0 on send it, and older QEMUs fail on it."""
    data = load("pc")
    at = end_of_ram(data)
    with parking() as engine:
        sent = data[:at] + SWITCHOVER_START + data[at:] if announced else data
        assert take_in(engine, sent, tmp_path) is MigrationStatus.COMPLETED, query_migrate(engine)
        engine.migrate(f"file:{tmp_path}/out")
        assert engine.wait_outgoing(PATIENCE) is MigrationStatus.COMPLETED
    out = (tmp_path / "out").read_bytes()
    end = end_of_ram(out)
    assert (out[end - len(SWITCHOVER_START) : end] == SWITCHOVER_START) is announced


@pytest.mark.parametrize(("times", "behind"), [(2, False), (1, True)], ids=["twice", "behind the END"])
def test_switchover_start_in_the_wrong_place_is_refused(times: int, behind: bool, tmp_path: Path) -> None:
    data = load("pc")
    at = len(data) - len(devices(data)) if behind else end_of_ram(data)
    with parking() as engine:
        sent = data[:at] + SWITCHOVER_START * times + data[at:]
        assert take_in(engine, sent, tmp_path) is MigrationStatus.FAILED
        assert "expected SWITCHOVER_START" in query_migrate(engine)["error-desc"]
