"""Machines with disks for tests: block nodes without data, to which the test writes as the guest would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from corefw.block import BlockNode, ByteRuns, no_byte_runs
from corefw.errors import MachineError
from corefw.machine import BlockMachine, BlockMakingMachine
from tests.helpers.machines import CountingMachine

MIB = 1 << 20


class Disk(BlockNode):
    """A node that records the ranges given to write()."""

    def __init__(self, name: str, length: int, *, device: str = "") -> None:
        super().__init__(name, length, device=device)
        self._written = no_byte_runs()

    def write(self, first: int, end: int) -> None:
        self._written = np.concatenate([self._written, np.array([[first, end]], dtype=np.int64)])

    def collect(self) -> ByteRuns:
        written, self._written = self._written, no_byte_runs()
        return written


class ClosingMachine(CountingMachine):
    """A machine for a `with` statement."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DiskMachine(ClosingMachine, BlockMachine):
    """A machine with these disks."""

    def __init__(self, *disks: Disk, incoming: bool = False) -> None:
        super().__init__(4, incoming=incoming)
        self.disks = disks

    def block_nodes(self) -> Sequence[BlockNode]:
        return self.disks


class DiskMakingMachine(ClosingMachine, BlockMakingMachine):
    """A machine that accepts any disk."""

    def __init__(self) -> None:
        super().__init__(4, incoming=True)
        self.nodes: list[BlockNode] = []

    def block_nodes(self) -> Sequence[BlockNode]:
        return self.nodes

    def make_block_node(self, name: str, length: int) -> BlockNode:
        if not name:
            raise MachineError("a block node without a name")
        self.nodes.append(BlockNode(name, length))
        return self.nodes[-1]


def state_of(machine: BlockMachine) -> dict[tuple[str, str], tuple[object, ...]]:
    """Everything about the bitmaps of a machine, except whether they are busy."""
    return {
        (node.name, one.name): (
            one.granularity,
            one.enabled,
            one.persistent,
            one.inconsistent,
            node.length,
            one.sha256(),
        )
        for node in machine.block_nodes()
        for one in node.bitmaps
    }
