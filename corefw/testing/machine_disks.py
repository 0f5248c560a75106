"""The contract kit for machines: disks, and dirty bitmaps that miss no write."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from corefw.machine import BlockMachine, Machine, RunState
from corefw.testing.machine_bench import Bench, check

if TYPE_CHECKING:
    from corefw.block import BlockNode, DirtyBitmap

BITMAP: Final = "contract-kit"
GRANULARITY: Final = 4096


@check
def _disks_have_names(bench: Bench) -> None:
    """A BlockMachine's disk is found by the names of its node and its device, and has the same length on both sides.

    Other machines pass.
    """
    here, there = _disks(bench.machine()), _disks(bench.machine(incoming=True))
    left, right = ([(node.name, node.length) for node in nodes] for nodes in (here, there))
    assert left == right, f"the source has the disks {left}, the destination {right}"
    assert len(dict(left)) == len(left), f"two disks have one name: {left}"
    devices = [node.device for node in here if node.device]
    assert len(set(devices)) == len(devices), f"two disks are of one device: {devices}"


@check
def _dirty_bitmaps_find_every_write(bench: Bench) -> None:
    """A copy of a disk that is updated from a bitmap, again and again, equals the disk in the end; and the guest writes
    nothing while it is stopped.

    Disks that are not in a file pass.
    """
    machine = bench.machine()
    copies = [_Copy(node) for node in _disks(machine) if node.filename and Path(node.filename).exists()]
    if not copies:
        return
    machine.start()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        for copy in copies:
            copy.refresh()
    machine.stop(RunState.PAUSED)
    for copy in copies:
        copy.refresh()
    bench.wait()
    for copy in copies:
        disk = f"disk '{copy.node.name}'"
        assert not copy.bitmap.count(), f"{disk} was written while the guest was stopped"
        wrong = copy.differences()
        assert not wrong, f"the bitmap of {disk} has no writes to the granules {wrong}"


class _Copy:
    """A copy of a disk, and the bitmap of later writes."""

    def __init__(self, node: BlockNode) -> None:
        self.node = node
        self.bitmap: DirtyBitmap = node.add_bitmap(BITMAP, GRANULARITY)
        self._data = bytearray(Path(node.filename).read_bytes())

    def refresh(self) -> None:
        with self.node.settled():
            dirty = self.bitmap.runs()
            self.bitmap.clear()
        with Path(self.node.filename).open("rb", buffering=0) as disk:
            for first, end in dirty.tolist():
                disk.seek(first)
                self._data[first:end] = disk.read(end - first)

    def differences(self) -> list[int]:
        """The first granules that differ from the disk."""
        disk = Path(self.node.filename).read_bytes()
        if disk == self._data:
            return []
        places = range(0, len(disk), GRANULARITY)
        found = [at for at in places if disk[at : at + GRANULARITY] != self._data[at : at + GRANULARITY]]
        return [at // GRANULARITY for at in found[:5]]


def _disks(machine: Machine) -> list[BlockNode]:
    if not isinstance(machine, BlockMachine):
        return []
    nodes = list(machine.block_nodes())
    for node in nodes:
        assert machine.find_node(node.name) is not None, f"find_node('{node.name}') finds nothing"
        assert not node.device or machine.find_node(node.device) is node, f"find_node('{node.device}') finds another"
    return nodes
