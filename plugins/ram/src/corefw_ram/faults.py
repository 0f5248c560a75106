"""Page faults that compiled code serves, and what it notes of them.

Compiled code notes in a journal what happens to a fault. What Python installs is measured at once. So the journal is
passed on before Python installs anything, or a fault would end before it began.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from corefw.machine import FaultEvent, FaultSource, FaultStage, GuestMapping, RamBlock
from corefw.memory.runs import distinct
from corefw.postcopy import FaultServer, ServedFaults
from corefw.wire.constants import TARGET_PAGE_SIZE
from corefw.wire.returnpath import PageRequest, page_request_message
from corefw_ram import kernel as compiled


class CompiledFaults(FaultServer):
    """The page faults of a guest, into whose RAM compiled code receives. Threads: any; one at a time may serve."""

    def __init__(self, kernel: compiled.Kernel, faults: FaultSource) -> None:
        self._kernel = kernel
        self._faults = faults
        self._journal = kernel.FaultJournal()
        self._passing_on = threading.Lock()
        self._kept: list[tuple[NDArray[np.generic], ...]] = []  # memory that compiled code has the address of
        self._names: list[str] = []  # of the blocks, by number
        self._blocks: list[tuple[compiled.KernelBlock, bytes]] = []
        self._userfaultfds: set[int] = set()
        self._server: compiled.FaultServer | None = None

    def receive_into(
        self,
        block: RamBlock,
        guest: GuestMapping,
        *,
        ram: NDArray[np.uint8],
        marks: NDArray[np.uint8],
        awaited: NDArray[np.bool_],
    ) -> compiled.KernelBlock:
        """Compiled code for one more block, with its pages and their marks."""
        made = self._kernel.ArrivingBlock(
            ram=ram.ctypes.data,
            pages=len(marks),
            marks=marks.ctypes.data,
            awaited=awaited.ctypes.data,
            userfaultfd=guest.userfaultfd,
            address=guest.address,
            journal=self._journal,
            number=len(self._blocks),
        )
        request = page_request_message(PageRequest(0, TARGET_PAGE_SIZE, block.idstr))
        self._kept.append((ram, marks, awaited))
        self._names.append(block.idstr)
        self._blocks.append((made, request))
        self._userfaultfds.add(guest.userfaultfd)
        return made

    def serves(self, blocks: int) -> bool:
        """Whether compiled code can serve the faults of a guest with so many blocks; false if it waits for nothing."""
        if len(self._blocks) != blocks or len(self._userfaultfds) != 1:
            return False
        (userfaultfd,) = self._userfaultfds
        if userfaultfd < 0:
            return False
        self._server = self._kernel.FaultServer(userfaultfd=userfaultfd, journal=self._journal, blocks=self._blocks)
        return True

    def serve(self, descriptor: int | None, wake: int, seconds: float | None) -> ServedFaults:
        assert self._server is not None, "see serves()"
        served = self._server.serve(-1 if descriptor is None else descriptor, wake, seconds)
        self.pass_on()
        return ServedFaults(served.unsent, self._by_block(served.missed), served.error)

    def pass_on(self) -> None:
        """Let what compiled code has noted be measured."""
        with self._passing_on:
            entries = self._journal.take()
            if len(entries):
                self._faults.note([self._event(*entry) for entry in entries.tolist()])

    def _event(self, when: int, stage: int, block: int, page: int, thread: int) -> FaultEvent:
        return FaultEvent(when, FaultStage(stage), self._names[block], page, thread)

    def _by_block(self, missed: Sequence[tuple[int, int]]) -> Mapping[str, NDArray[np.int64]]:
        found: dict[str, list[int]] = {}
        for number, page in missed:
            found.setdefault(self._names[number], []).append(page)
        return {name: distinct(np.array(pages, dtype=np.int64)) for name, pages in found.items()}
