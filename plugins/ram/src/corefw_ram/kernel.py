"""Finds the compiled code, which does some of what this package does in Python.

The distribution migfw-ram-kernel brings it, and registers it under the entry point `ram` in the group `corefw.kernel`
(docs/decisions/compiled-kernel.md). Its docstrings say what each function takes and returns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

NEEDED: Final = ("receive_lists", "ArrivingBlock", "DirtyBlock", "FaultServer", "FaultJournal", "PageServer")
"""What the compiled code has to provide. That of an older version provides less."""


class Begun(Protocol):
    """A page that is claimed, and of which `size` bytes are in place."""

    page: int
    size: int


class Stored(Protocol):
    """What became of records of the stream."""

    taken: int
    next: int
    whole: int
    begun: Begun | None
    left: memoryview
    failed: tuple[int, int] | None


class Requested(Protocol):
    """What came over the channel of requested pages."""

    taken: int
    begun: Begun | None
    left: bytes
    failed: tuple[int, int] | None


class KernelBlock(Protocol):
    """`corefw_ram_kernel.ArrivingBlock`: a RAM block that arrives while the guest runs."""

    def store(self, records: int, size: int, *, begin: bool) -> Stored: ...

    def receive(self, descriptor: int, following: int, total: int, begun: Begun | None) -> Stored: ...

    def receive_requested(self, descriptor: int) -> Requested: ...

    def claim(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]: ...

    def give_up(self, pages: NDArray[np.int64]) -> None: ...

    def mark_received(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]: ...

    def wait_for(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]: ...


class FaultJournal(Protocol):
    """`corefw_ram_kernel.FaultJournal`: what happens to the guest's page faults."""

    def take(self) -> NDArray[np.int64]: ...


class ServedFaults(Protocol):
    """What is left to do after page faults were served."""

    unsent: bytes
    missed: Sequence[tuple[int, int]]
    error: OSError | None


class FaultServer(Protocol):
    """`corefw_ram_kernel.FaultServer`: serves the guest's page faults."""

    def serve(self, descriptor: int, wake: int, seconds: float | None) -> ServedFaults: ...


class DirtyBlock(Protocol):
    """`corefw_ram_kernel.DirtyBlock`: what is left of a RAM block that is being sent in postcopy."""

    done: bool
    next: int
    claimed: NDArray[np.int64]
    zeros: int

    def begin(self, first: int, most: int) -> None: ...

    def send(self, descriptor: int) -> int: ...

    def claim(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]: ...


DirtyBlocks = Mapping[str, DirtyBlock]
"""RAM blocks by name."""


class Served(Protocol):
    """What was done about page requests."""

    requests: int
    claimed: dict[str, int]
    zeros: int


class PageServer(Protocol):
    """`corefw_ram_kernel.PageServer`: answers page requests."""

    asked: str | None
    named: str | None
    unfinished: bool
    claiming: bool
    left: bytes
    sent: int

    def serve(self, incoming: int, outgoing: int) -> int: ...

    def finish(self, outgoing: int) -> None: ...

    def take(self) -> Served: ...


class Kernel(Protocol):
    """`corefw_ram_kernel.Kernel`."""

    def receive_lists(
        self, descriptor: int, *, ram: int, pages: int, headers: int, first: int, size: int, most: int, total: int
    ) -> tuple[int, int, int]: ...

    def ArrivingBlock(  # noqa: N802 - a class
        self,
        *,
        ram: int,
        pages: int,
        marks: int,
        awaited: int,
        userfaultfd: int,
        address: int,
        journal: FaultJournal,
        number: int,
    ) -> KernelBlock: ...

    def FaultServer(  # noqa: N802 - as above
        self, *, userfaultfd: int, journal: FaultJournal, blocks: Sequence[tuple[KernelBlock, bytes]]
    ) -> FaultServer: ...

    def FaultJournal(self) -> FaultJournal: ...  # noqa: N802 - as above

    def DirtyBlock(self, *, ram: int, pages: int, dirty: int, hole: int) -> DirtyBlock: ...  # noqa: N802 - as above

    def PageServer(self, blocks: DirtyBlocks) -> PageServer: ...  # noqa: N802 - as above


@cache
def find_kernel() -> Kernel | None:
    """The compiled code; None where none is installed, or it does not load or is too old: that is logged once."""
    for point in entry_points(group="corefw.kernel", name="ram"):
        try:
            kernel = point.load()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, Python does the same
            log.warning("the compiled kernel %s does not load, and is not used: %s", point.value, error)
            continue
        missing = [name for name in NEEDED if not hasattr(kernel, name)]
        if not missing:
            return cast("Kernel", kernel)
        log.warning(
            "the compiled kernel %s is too old, and is not used: it has no %s (update migfw-ram-kernel)",
            point.value,
            ", ".join(missing),
        )
    return None
