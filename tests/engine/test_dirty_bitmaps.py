"""Python programs move with the dirty bitmaps of their disks: every bit arrives, or the bitmap is inconsistent.

A sector of Writer's disk holds the number of the step that wrote it, so what was written since a bitmap began can be
read from the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from corefw.block import DirtyBitmap
from corefw.engine import Engine
from corefw.errors import StateError
from corefw.machine import BlockMachine, MachineConfig, RunState
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until
from tests.helpers.cutting import Cut, CutProxy
from tests.helpers.engines import Pair, arrived, ended, query_migrate
from tests.helpers.moving import LISTEN

PROGRAM = Path(__file__).parents[2] / "plugins/machine_python/tests/programs/disks.py"
SECTOR = 512
SLOW = 64 << 10
"""Bytes per second: the bits of a large disk take seconds."""
SLOWER = 16 << 10
"""Bytes per second if the test has to interfere, also on a busy machine."""
LARGE = 1 << 21
"""Sectors."""


class Disks:
    """Two engines with Writer, whose disk is one file."""

    def __init__(self, pair: Pair, image: Path, *capabilities: str, sectors: int = 4096) -> None:
        self.image = image
        options = {"image": str(image), "sectors": str(sectors)}
        self.source, self.destination = (
            pair.engine(pair.plugins.machine("python", MachineConfig(f"{PROGRAM}:Writer", options, incoming)), {})
            for incoming in (False, True)
        )
        for engine in (self.source, self.destination):
            engine.set_capabilities(dict.fromkeys(("dirty-bitmaps", *capabilities), True))

    def steps(self) -> NDArray[np.int64]:
        """For each sector, the step that wrote it last."""
        return np.fromfile(self.image, dtype="<i8").reshape(-1, SECTOR // 8)[:, 0]

    def run_for_a_while(self, engine: Engine) -> None:
        def step() -> int:
            return int(str(engine.verify()["step"]))

        before = step()
        assert wait_until(lambda: step() > before + 200)


def listen_after_the_end(engine: Engine) -> str:
    """Let the destination listen, so that the source can ask how its migration ended. Waits until that is possible."""
    uris: list[str] = []

    def listens() -> bool:
        with suppress(StateError):
            uris.append(engine.recover(LISTEN))
        return bool(uris)

    assert wait_until(listens)
    return uris[0]


def assert_left(engine: Engine) -> None:
    assert engine.machine.run_state is RunState.POSTMIGRATE


def bitmap(engine: Engine, name: str = "since") -> DirtyBitmap:
    assert isinstance(engine.machine, BlockMachine)
    return engine.machine.block_nodes()[0].bitmap(name)


def add(engine: Engine, name: str, granularity: int = SECTOR, *, enabled: bool = True) -> DirtyBitmap:
    assert isinstance(engine.machine, BlockMachine)
    return engine.machine.block_nodes()[0].add_bitmap(name, granularity, enabled=enabled)


def sectors_of(found: DirtyBitmap) -> set[int]:
    return {sector for first, end in found.runs().tolist() for sector in range(first // SECTOR, end // SECTOR)}


@pytest.mark.parametrize(
    ("capabilities", "postcopy"),
    [((), False), ((), True), (("postcopy-ram",), True)],
    ids=["precopy", "postcopy of bitmaps alone", "postcopy"],
)
def test_every_write_is_in_the_bitmap(
    capabilities: tuple[str, ...], postcopy: bool, pair: Pair, tmp_path: Path
) -> None:
    disks = Disks(pair, tmp_path / "disk.raw", *capabilities)
    source, destination = disks.source, disks.destination
    source.cont()
    disks.run_for_a_while(source)
    source.stop()
    began = int(disks.steps().max())
    add(source, "since")
    off = add(source, "off", enabled=False)
    off.mark(np.array([[0, 10 * SECTOR]], dtype=np.int64))
    source.cont()
    source.set_parameters({"max-bandwidth": 4096 if postcopy else 4 << 20})
    source.migrate(destination.migrate_incoming(LISTEN))
    if postcopy:
        source.start_postcopy()
        source.set_parameters({"max-bandwidth": 4 << 20})
    assert ended(source) == "completed", source.report().error
    assert arrived(destination) == "completed", destination.report().error
    assert (query_migrate(source)["ram"]["postcopy-bytes"] > 0) == postcopy
    disks.run_for_a_while(destination)
    destination.stop()
    since = bitmap(destination)
    assert (since.enabled, since.busy, since.inconsistent) == (True, False, False)
    assert sectors_of(since) == set(np.flatnonzero(disks.steps() > began).tolist())
    assert sectors_of(bitmap(destination, "off")) == set(range(10))
    assert not bitmap(destination, "off").enabled


def test_a_bitmap_is_busy_while_it_moves_and_usable_where_it_stays(pair: Pair, tmp_path: Path) -> None:
    disks = Disks(pair, tmp_path / "disk.raw")
    source = disks.source
    source.set_capabilities({"pause-before-switchover": True})
    since = add(source, "since")
    source.cont()
    source.migrate(disks.destination.migrate_incoming(LISTEN))
    assert wait_until(lambda: source.outgoing.status is MigrationStatus.PRE_SWITCHOVER)
    with pytest.raises(StateError, match="in use by another operation"):
        since.check()
    assert query_migrate(source).get("blocked-reasons", []) == []
    source.cancel()
    assert ended(source) == "cancelled"
    since.check()
    assert since.enabled
    assert arrived(disks.destination) == "failed"
    assert isinstance(disks.destination.machine, BlockMachine)
    assert not disks.destination.machine.block_nodes()[0].bitmaps


@pytest.fixture
def broken(pair: Pair, tmp_path: Path) -> Iterator[Disks]:
    """A migration whose guest runs on the destination, where only bitmaps are missing, and whose connection broke."""
    with ExitStack() as stack:
        disks = Disks(pair, tmp_path / "disk.raw", sectors=LARGE)
        add(disks.source, "since").mark(np.array([[0, LARGE * SECTOR]], dtype=np.int64))
        disks.source.cont()
        disks.source.set_parameters({"max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOWER})
        proxy = stack.enter_context(CutProxy(disks.destination.migrate_incoming(LISTEN)))
        disks.source.migrate(proxy.uri)
        disks.source.start_postcopy()
        assert wait_until(lambda: disks.destination.machine.run_state is RunState.RUNNING)
        assert bitmap(disks.destination).busy
        for engine in (disks.source, disks.destination):
            with pytest.raises(StateError, match="only supported during postcopy-active"):
                engine.pause_migration()
        proxy.cut(Cut.RESET)
        yield disks


def test_without_a_connection_the_guest_runs_on_and_its_bitmap_is_inconsistent(
    broken: Disks, caplog: pytest.LogCaptureFixture
) -> None:
    assert arrived(broken.destination) == "completed"
    lost = bitmap(broken.destination)
    assert (lost.inconsistent, lost.busy, lost.enabled) == (True, False, False)
    assert "block-dirty-bitmap-remove" in caplog.text
    with pytest.raises(StateError, match="inconsistent"):
        lost.check()
    source = broken.source
    assert wait_until(lambda: source.outgoing.status is MigrationStatus.POSTCOPY_PAUSED)
    source.migrate(listen_after_the_end(broken.destination), resume=True)
    assert ended(source) == "completed", source.report().error
    assert_left(source)
    assert bitmap(broken.source).count() == LARGE * SECTOR


def test_after_a_recovery_every_write_is_in_the_bitmap(pair: Pair, tmp_path: Path) -> None:
    """What was sent before is sent again, and what the guest writes meanwhile is recorded."""
    sectors = 1 << 18
    disks = Disks(pair, tmp_path / "disk.raw", "postcopy-ram", sectors=sectors)
    source, destination = disks.source, disks.destination
    source.cont()
    disks.run_for_a_while(source)
    source.stop()
    began = int(disks.steps().max())
    add(source, "since")
    add(source, "all").mark(np.array([[0, sectors * SECTOR]], dtype=np.int64))
    source.cont()
    source.set_parameters({"max-bandwidth": SLOWER // 4, "max-postcopy-bandwidth": SLOWER // 4})
    with CutProxy(destination.migrate_incoming(LISTEN)) as proxy:
        source.migrate(proxy.uri)
        source.start_postcopy()
        assert wait_until(lambda: destination.machine.run_state is RunState.RUNNING)
        proxy.cut(Cut.RESET)
        assert wait_until(lambda: source.outgoing.status is MigrationStatus.POSTCOPY_PAUSED)
        assert wait_until(lambda: destination.incoming.status is MigrationStatus.POSTCOPY_PAUSED)
        assert bitmap(destination, "all").busy
        proxy.lead_to(destination.recover(LISTEN))
        source.set_parameters({"max-postcopy-bandwidth": 0})
        source.migrate(proxy.uri, resume=True)
        assert ended(source) == "completed", source.report().error
        assert arrived(destination) == "completed"
    disks.run_for_a_while(destination)
    destination.stop()
    assert bitmap(destination, "all").count() == sectors * SECTOR
    since = bitmap(destination)
    assert (since.enabled, since.busy, since.inconsistent) == (True, False, False)
    assert sectors_of(since) == set(np.flatnonzero(disks.steps() > began).tolist())


def test_where_nothing_comes_back_there_is_no_postcopy(pair: Pair, tmp_path: Path) -> None:
    disks = Disks(pair, tmp_path / "disk.raw")
    disks.source.set_capabilities({"return-path": False, "pause-before-switchover": True})
    add(disks.source, "since")
    disks.source.migrate(f"file:{tmp_path}/stored")
    with pytest.raises(StateError, match="no return path, which postcopy needs"):
        disks.source.start_postcopy()
    assert wait_until(lambda: disks.source.outgoing.status is MigrationStatus.PRE_SWITCHOVER)
    disks.source.continue_migration(MigrationStatus.PRE_SWITCHOVER)
    assert ended(disks.source) == "completed"
