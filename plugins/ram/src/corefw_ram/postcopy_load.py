"""The destination's half of postcopy: pages arrive while the guest runs, some of them because it waits for them.

Invariant: a page that has arrived is never stored again, for the guest may have written to it since. It may come twice,
when it was asked for while the background stream had it on the way, or when a connection broke. So a page belongs to
the thread that claims it first, and counts as arrived when that one has stored it.

Threads: storing in the incoming thread and in that of requested pages, `wait_for` in the thread that serves page
faults.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from corefw.errors import ANYTHING, StreamError
from corefw.machine import FaultSource, Machine, RamBlock
from corefw.memory.runs import Runs, distinct, runs_of_mask, runs_of_pages
from corefw.section import IncomingContext
from corefw_ram.load import LoadedBlock, PageLoader

AROUND = 16
"""Pages, in aligned groups of as many, that are installed together when the guest touches one that has arrived. As
with the kernel's fault-around, neighbours are likely to be needed next."""


class ArrivingBlock(LoadedBlock):
    """A block from the moment on when the guest may run.

    Every page counts as arrived that was not `discarded` (a mark per page): the source discards all that it has still
    to send. Little is read ahead: a kernel without preemption lets no thread that has a requested page run before all
    of that was stored.
    """

    read_ahead = 1 << 20

    def __init__(self, block: RamBlock, discarded: NDArray[np.bool_], faults: FaultSource) -> None:
        super().__init__(block)
        self.direct.stop()
        self._faults = faults
        self._lock = threading.Lock()  # guards the marks
        self._claimed = ~discarded
        self._received = ~discarded
        self._awaited = np.zeros_like(discarded)

    # -- what arrives ----------------------------------------------------------------------------------------------

    def store(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        new = self._claim(pages)
        if not new.all():
            pages, data = pages[new], data[new]
        with self._storing(pages):
            self.block.store(pages, data)
        with self._lock:
            self._received[pages] = True
        self._install(runs_of_pages(distinct(pages)))

    def store_page(self, page: int, data: bytes) -> None:
        """The same for a single page, in a fraction of the time. The guest waits for it."""
        with self._lock:
            if self._claimed[page]:
                return
            self._claimed[page] = True
        at = page * self.block.page_size
        self.block.view[at : at + self.block.page_size] = data
        with self._lock:
            self._received[page] = True
        self._install(np.array([[page, page + 1]]))

    def fill(self, pages: NDArray[np.int64], value: int) -> None:
        """Zeros stay where nothing is allocated until the guest touches them."""
        pages = pages[self._claim(pages)]
        with self._storing(pages):
            self.block.fill(pages, value)
        with self._lock:
            self._received[pages] = True
            seen = pages if value else pages[self._awaited[pages]]
        self._install(runs_of_pages(distinct(seen)))

    def _claim(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these pages the caller is to store."""
        with self._lock:
            new = ~self._claimed[pages]
            self._claimed[pages] = True
            return new

    @contextmanager
    def _storing(self, pages: NDArray[np.int64]) -> Iterator[None]:
        """Give up the claim to these pages if they cannot be stored: they may come again after a recovery."""
        try:
            yield
        except ANYTHING:
            with self._lock:
                self._claimed[pages] = False
            raise

    def _install(self, runs: Runs) -> None:
        self._faults.install(self.block, runs)

    # -- what the guest waits for ----------------------------------------------------------------------------------

    def wait_for(self, pages: NDArray[np.int64]) -> Runs:
        """The guest waits for these pages. Install those that have arrived; the others, to be asked for."""
        if len(pages) == 1 and self._awaits(int(pages[0])):
            return np.array([[pages[0], pages[0] + 1]])
        with self._lock:
            here = self._received[pages]
            missing = pages[~here]
            self._awaited[missing] = True
            near = self._received_around(pages[here])
        self._install(near)
        return runs_of_pages(missing)

    def _awaits(self, page: int) -> bool:
        """Whether this page has not arrived; then it is awaited from now on."""
        with self._lock:
            missing = not self._received[page]
            if missing:
                self._awaited[page] = True
            return missing

    def _received_around(self, pages: NDArray[np.int64]) -> Runs:
        groups = distinct(pages // AROUND)
        near = (groups[:, np.newaxis] * AROUND + np.arange(AROUND)).ravel()
        near = near[near < len(self._received)]
        return runs_of_pages(near[self._received[near]])

    def outstanding(self) -> Runs:
        """What the guest waits for and has not arrived."""
        with self._lock:
            return runs_of_mask(self._awaited & ~self._received)

    def received(self) -> NDArray[np.bool_]:
        """A copy of the marks, one a page."""
        with self._lock:
            return self._received.copy()


class PostcopyPageLoader(PageLoader):
    """Loads the bodies of one migration's 'ram' sections, after listen() while the guest runs."""

    def __init__(self, machine: Machine, context: IncomingContext) -> None:
        super().__init__(machine, context)
        self._discarded: dict[str, NDArray[np.bool_]] = {}
        self._arriving: dict[str, ArrivingBlock] = {}

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
        marks = self._discarded.setdefault(idstr, np.zeros(block.length // size, dtype=np.bool_))
        marks[start // size : (start + length) // size] = True

    def listen(self, faults: FaultSource) -> None:
        """The guest is about to run: from now on what is stored is installed."""
        current = self._block and self._block.block.idstr
        for idstr, loaded in self._blocks.items():
            pages = loaded.block.length // loaded.block.page_size
            discarded = self._discarded.get(idstr, np.zeros(pages, dtype=np.bool_))
            self._arriving[idstr] = ArrivingBlock(loaded.block, discarded, faults)
        self._blocks.update(self._arriving)
        self._block = self._blocks[current] if current else None

    def arriving(self, idstr: str) -> ArrivingBlock:
        """Raises StreamError for a name that is no RAM block's."""
        block = self._arriving.get(idstr)
        if block is None:
            raise StreamError(f"expected one of the RAM blocks {', '.join(self._arriving)}, got '{idstr}'")
        return block
