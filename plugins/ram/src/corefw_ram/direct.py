"""Pages straight from the socket into guest RAM: one copy, and one system call for 512 of them.

A stream does not say what comes next, but in the first pass it nearly always is the next page. So the kernel is given
a list of where things would lie if a run of pages went on: header, page, header, page. Then the headers are looked at.

The law: a guess that was wrong changes nothing but what is allocated. It is only made for pages that nothing but zeros
was ever stored in, of blocks that were untouched when the migration began; what then turns out to be something else is
taken out again and read the usual way, and the pages are zero as before.

It saves more than a third of the destination's processor time (docs/performance.md has the figures); huge pages are a
condition, for a fault at each small one costs more than it saves.

Threads: the incoming thread.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import RamBlock
from corefw.wire.constants import TARGET_PAGE_SIZE, RamFlag
from corefw.wire.stream import StreamReader

HEADER: Final = 8
RECORD: Final = HEADER + TARGET_PAGE_SIZE
MOST: Final = 512
"""Pages in a call: with their headers the 1024 pieces that it takes."""
FIRST: Final = 32
"""Pages in the first call of a run, and after a wrong guess; twice as many each time it was right."""

RUN: Final = 4
"""Pages that follow one another: then more may do so."""

FLAGS: Final = int(RamFlag.PAGE | RamFlag.CONTINUE)


class Guess:
    """Where one block's run of pages is expected to go on."""

    def __init__(self, block: RamBlock) -> None:
        """Before anything is stored in `block`."""
        self._block = block
        pages = block.length // block.page_size
        fits = block.huge and block.page_size == TARGET_PAGE_SIZE and block.holes().tolist() == [[0, pages]]
        self._end = pages if fits else 0
        self._fresh = 0  # from here on nothing but zeros was stored
        self._next: int | None = None  # the page after a run, when that was stored last
        self._count = FIRST
        self._headers = np.empty(MOST, dtype=">u8")
        self._pieces = np.empty((2 * MOST, 2), dtype=np.uint64)
        self._pieces[0::2, 0] = self._headers.ctypes.data + HEADER * np.arange(MOST)
        self._pieces[0::2, 1] = HEADER
        self._pieces[1::2, 1] = TARGET_PAGE_SIZE

    def stored(self, pages: NDArray[np.int64]) -> None:
        """A run of records was stored in these pages, in this order."""
        self._fresh = max(self._fresh, int(pages.max()) + 1)
        last = int(pages[-1])
        self._next = last + 1 if len(pages) >= RUN and last - int(pages[-RUN]) == RUN - 1 else None

    def zeroed(self) -> None:
        """Zeros were stored; in which pages does not matter."""
        self._next = None

    def stop(self) -> None:
        """Make no more guesses."""
        self._end = 0

    def receive(self, reader: StreamReader) -> bool:
        """Receive records past the buffer. False where there is no guess, or it was wrong: then the reader is at the
        record that is another one."""
        start, end = reader.span()
        held = end - start
        if self._next is None or not self._next == self._fresh < self._end or not reader.receives_memory:
            return False
        if held and (held < HEADER or held >= RECORD or not self._begins_here(reader)):
            return False
        if held:
            reader.skip(HEADER)
            self._finish_page(reader, self._next, 0)
            self._go_on(1)
            return True
        return self._receive_run(reader, self._next)

    def _begins_here(self, reader: StreamReader) -> bool:
        assert self._next is not None
        start, _ = reader.span()
        return reader.buffer[start : start + HEADER] == self._wanted(self._next, 1).tobytes()

    def _receive_run(self, reader: StreamReader, first: int) -> bool:
        ram = self._block.pages  # held on to while the kernel writes there; empty when the block was closed
        count = min(self._count, len(ram) - first, len(reader.buffer) // RECORD)
        if count <= 0:
            return False
        places = np.arange(first, first + count, dtype=np.uint64) * np.uint64(TARGET_PAGE_SIZE)
        self._pieces[1 : 2 * count : 2, 0] = places + np.uint64(ram.ctypes.data)
        received = reader.receive_memory(self._pieces[: 2 * count])
        records, part = divmod(received, RECORD)
        right = self._right(first, records)
        if right == records and 0 < part < HEADER:
            # Behind a page's record there is always a header. Behind anything else there may be nothing at all.
            reader.read_into(self._header(records), "a RAM record's header", part)
            part = HEADER
        begun = records + (part > 0)
        if right == records:
            right = self._right(first, begun)
        if right < begun:
            self._take_out(reader, first, right, begun, (records - right) * RECORD + part)
            self._count = FIRST
            self._go_on(right)
            return False
        if part:
            self._finish_page(reader, first + records, part - HEADER)
        self._count = min(2 * self._count, MOST)
        self._go_on(begun)
        return begun > 0

    def _right(self, first: int, count: int) -> int:
        """How many of the `count` headers are what was guessed, up to the first that is not."""
        wrong = np.flatnonzero(self._headers[:count] != self._wanted(first, count))
        return int(wrong[0]) if len(wrong) else count

    def _go_on(self, pages: int) -> None:
        self._fresh += pages
        self._next = self._fresh

    def _finish_page(self, reader: StreamReader, page: int, done: int) -> None:
        at = page * TARGET_PAGE_SIZE
        reader.read_into(self._block.view[at : at + TARGET_PAGE_SIZE], "a page", done)

    def _take_out(self, reader: StreamReader, first: int, right: int, begun: int, count: int) -> None:
        """Give the records from `right` on, `count` bytes, back to the reader, and leave zeros where they were."""
        pages = slice(first + right, first + begun)
        rows = np.empty((begun - right, RECORD), dtype=np.uint8)
        rows[:, :HEADER] = self._headers[right:begun].view(np.uint8).reshape(-1, HEADER)
        rows[:, HEADER:] = self._block.pages[pages]
        self._block.fill(np.arange(pages.start, pages.stop), 0)
        reader.unread(rows.data.cast("B")[:count])

    def _header(self, number: int) -> memoryview:
        return self._headers[number : number + 1].data.cast("B")

    @staticmethod
    def _wanted(first: int, count: int) -> NDArray[np.uint64]:
        return (np.arange(first, first + count) * TARGET_PAGE_SIZE | FLAGS).astype(">u8")
