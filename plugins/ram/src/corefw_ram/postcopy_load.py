"""The destination's half of postcopy: pages arrive while the guest runs, some of them because it waits for them.

Invariant: a page that has arrived is never stored again, for the guest may have written to it since. It may come twice,
when it was asked for while the background stream had it on the way, or when a connection broke. So a page belongs to
the thread that claims it first, and counts as arrived when that one has stored it.

Threads: storing in the incoming thread and in that of requested pages, `wait_for` in the thread that serves page
faults.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import ANYTHING, StreamError
from corefw.machine import FaultSource, Machine, RamBlock
from corefw.memory.runs import Runs, distinct, runs_of_mask, runs_of_pages
from corefw.section import IncomingContext
from corefw.wire.stream import StreamReader
from corefw_ram.arriving import ArrivingReceiver
from corefw_ram.direct import InPlaceReceiver
from corefw_ram.faults import CompiledFaults
from corefw_ram.kernel import Begun, KernelBlock, find_kernel
from corefw_ram.load import LoadedBlock, PageLoader
from corefw_ram.marks import MISSING, RECEIVED, KernelMarks, LockedMarks, PageMarks

AROUND = 16
"""Pages, in aligned groups of as many, that are installed together when the guest touches one that has arrived. As
with the kernel's fault-around, neighbours are likely to be needed next."""
NAP: Final = 0.0005
"""Seconds between two looks at a page that another thread has claimed."""


class ArrivingBlock(LoadedBlock):
    """A block from the moment on when the guest may run.

    Little is read ahead: a kernel without preemption lets no thread that has a requested page run before all
    of that was stored.

    kernel   compiled code that receives into the block, where it is installed and can let the guest see pages
    marks    which pages have arrived
    """

    read_ahead = 1 << 20

    def __init__(
        self, block: RamBlock, marks: NDArray[np.uint8], faults: FaultSource, compiled: CompiledFaults | None
    ) -> None:
        self.kernel: KernelBlock | None = None
        self.marks: PageMarks
        self._faults = faults
        self._compiled = compiled
        mapping = faults.mapping(block)
        if compiled is not None and mapping is not None:
            kernel_marks = KernelMarks(marks, block, compiled, mapping)
            self.marks, self.kernel = kernel_marks, kernel_marks.kernel
        else:
            self.marks = LockedMarks(marks)
        # A fault for each small page costs more than a second copy.
        in_place = self.kernel is not None and block.huge
        super().__init__(block, ArrivingReceiver(self, self.kernel) if self.kernel and in_place else InPlaceReceiver())

    # -- what arrives ----------------------------------------------------------------------------------------------

    def store(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        new = self.marks.claim(pages)
        stored = pages
        if not new.all():
            stored, data = pages[new], data[new]
        with self._storing(stored):
            self.block.store(stored, data)
        self.marks.mark_received(stored)
        self._install(runs_of_pages(distinct(stored)))
        self.direct.note_stored(pages)

    def store_page(self, page: int, data: bytes) -> None:
        """The same for a single page, which the guest waits for."""
        pages = np.array([page])
        while not self.marks.claim(pages)[0]:
            if self.marks.has(pages)[0]:
                return
            time.sleep(NAP)  # it is expected in the stream, or comes there too
        at = page * self.block.page_size
        self.block.view[at : at + self.block.page_size] = data
        self._has_arrived(page)

    def fill(self, pages: NDArray[np.int64], value: int) -> None:
        """Zeros stay where nothing is allocated until the guest touches them."""
        pages = pages[self.marks.claim(pages)]
        with self._storing(pages):
            self.block.fill(pages, value)
        awaited = self.marks.mark_received(pages)
        self._install(runs_of_pages(distinct(pages if value else pages[awaited])))

    @contextmanager
    def _storing(self, pages: NDArray[np.int64]) -> Iterator[None]:
        """Give up the claim to these pages if they cannot be stored: they may come again after a recovery."""
        try:
            yield
        except ANYTHING:
            self.marks.give_up(pages)
            raise

    def _has_arrived(self, page: int) -> None:
        self.marks.mark_received(np.array([page]))
        self._install(np.array([[page, page + 1]]))

    def _install(self, runs: Runs) -> None:
        if self._compiled is not None:
            self._compiled.pass_on()
        self._faults.install(self.block, runs)

    # -- what compiled code has begun ------------------------------------------------------------------------------

    def give_up(self, *begun: Begun | None) -> None:
        """These pages cannot be finished, those that have not been."""
        self.marks.give_up(np.array([one.page for one in begun if one is not None], dtype=np.int64))

    def finish(self, reader: StreamReader, begun: Begun) -> None:
        """Receive the rest of a page."""
        at = begun.page * self.block.page_size
        with self._storing(np.array([begun.page])):
            reader.read_into(self.block.view[at : at + self.block.page_size], "a page", begun.size)
        self._has_arrived(begun.page)

    def install_failed(self, failed: tuple[int, int] | None) -> None:
        """Compiled code could not let the guest see pages in this range, if there is one, that have arrived."""
        if failed is not None:
            first, end = failed
            self._install(runs_of_mask(self.marks.has(np.arange(first, end)), first))

    # -- what the guest waits for ----------------------------------------------------------------------------------

    def wait_for(self, pages: NDArray[np.int64]) -> Runs:
        """The guest waits for these pages. Install those that have arrived; the others, to be asked for."""
        missing = self.marks.wait_for(pages)
        if len(pages) == 1 and missing[0]:
            return np.array([[pages[0], pages[0] + 1]])  # nearly always; the functions for more take longer
        if not missing.all():
            self._install(self._received_around(pages[~missing]))
        return runs_of_pages(pages[missing])

    def _received_around(self, pages: NDArray[np.int64]) -> Runs:
        groups = distinct(pages // AROUND)
        near = (groups[:, np.newaxis] * AROUND + np.arange(AROUND)).ravel()
        near = near[near < len(self.marks)]
        return runs_of_pages(near[self.marks.has(near)])


class PostcopyPageLoader(PageLoader):
    """Loads the bodies of one migration's 'ram' sections, after listen() while the guest runs."""

    def __init__(self, machine: Machine, context: IncomingContext) -> None:
        super().__init__(machine, context)
        self._marks: dict[str, NDArray[np.uint8]] = {}
        self._arriving: dict[str, ArrivingBlock] = {}
        self._compiled: CompiledFaults | None = None

    def discard(self, idstr: str, start: int, length: int) -> None:
        """Forget pages that arrived in precopy. Raises StreamError for what is not whole pages of a block."""
        loaded = self._blocks.get(idstr)
        if loaded is None:
            raise StreamError(f"expected one of the RAM blocks {', '.join(self._blocks)}, got '{idstr}'")
        block, size = loaded.block, loaded.block.page_size
        if start % size or length % size or start + length > block.length:
            raise StreamError(
                f"expected whole pages within the {block.length} bytes of RAM block '{idstr}',"
                f" got {length} bytes at {start:#x}"
            )
        self._marks_of(block)[start // size : (start + length) // size] = MISSING

    def _marks_of(self, block: RamBlock) -> NDArray[np.uint8]:
        """Every page counts as received that is not discarded: the source discards all that it has still to send."""
        if block.idstr not in self._marks:
            self._marks[block.idstr] = np.full(block.length // block.page_size, RECEIVED, dtype=np.uint8)
        return self._marks[block.idstr]

    def listen(self, faults: FaultSource) -> None:
        """The guest is about to run: from now on what is stored is installed."""
        current, kernel = self._block and self._block.block.idstr, find_kernel()
        self._compiled = None if kernel is None else CompiledFaults(kernel, faults)
        for idstr, loaded in self._blocks.items():
            marks = self._marks_of(loaded.block)
            self._arriving[idstr] = ArrivingBlock(loaded.block, marks, faults, self._compiled)
        self._blocks.update(self._arriving)
        self._block = self._blocks[current] if current else None

    def fault_server(self) -> CompiledFaults | None:
        """Compiled code that serves the faults in all blocks, where it can."""
        if self._compiled is None or not self._compiled.serves(len(self._arriving)):
            return None
        return self._compiled

    def missing(self) -> int | None:
        """Bytes of RAM that have not arrived; None before listen(). From any thread."""
        blocks = list(self._arriving.values())
        missing = (int(np.count_nonzero(~one.marks.received())) * one.block.page_size for one in blocks)
        return sum(missing) if blocks else None

    def arriving(self, idstr: str) -> ArrivingBlock:
        """Raises StreamError for a name that is no RAM block's."""
        block = self._arriving.get(idstr)
        if block is None:
            raise StreamError(f"expected one of the RAM blocks {', '.join(self._arriving)}, got '{idstr}'")
        return block
