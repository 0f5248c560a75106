"""Receives runs of pages straight from the socket into guest RAM: one copy, and one system call for 512 pages.

A stream does not announce what comes next, but in the first pass it nearly always is the next page. So the kernel is
given the places of a run that goes on, header, page, header, page; then the headers are compared with those expected
(lists.py).

Invariant: an expectation that was wrong changes no contents. Only pages known to be zero are received into: those of a
block that held nothing but zeros when the migration began, behind the last page that was stored since. Anything else
that turns up there is put back into the reader, to be parsed the usual way, and the pages are zero again.

At the end of a section's body something else comes for certain. Bodies of one source are often equally long, so one
that is as long as the last is expected to end: only a few bytes are read there, and what follows is in place again.

Huge pages are a condition: a fault for each small page costs more than the second copy (docs/performance.md).

Threads: the incoming thread.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import RamBlock
from corefw.wire.constants import TARGET_PAGE_SIZE
from corefw.wire.stream import StreamReader
from corefw_ram.lists import FLAGS, MOST, ListReceiver
from corefw_ram.records import HEADER, PAGE_RECORD

FIRST: Final = 32
"""Pages in the first list of a run, and after a wrong expectation; each time it was right, twice as many."""

RUN: Final = 4
"""Consecutive pages after which more are expected."""

SHARE: Final = 4
"""No list has more than this fraction of the last body: what it receives behind the end is copied twice."""

BOUNDARY: Final = 64
"""Bytes read where a body is expected to end: enough for its end, the header of the next section and of a record."""


class InPlaceReceiver:
    """Receives pages of one block past the reader's buffer. This one receives none."""

    @property
    def expects(self) -> bool:
        """Whether a run of pages is expected: one that goes on, or a guest's first pages."""
        return False

    def end_body(self) -> None:
        """The body of a section has ended. The next one is probably as long."""

    def note_stored(self, pages: NDArray[np.int64]) -> None:
        """A run of records was stored in these pages, in this order."""

    def note_zeroed(self) -> None:
        """Zeros were stored, in whichever pages."""

    def receive(self, reader: StreamReader) -> bool:
        """Receive records past the reader's buffer. False where no run is expected, or something else came: then the
        reader is in front of that. Raises RemoteStreamError, ChannelError, MachineError."""
        del reader
        return False


class DirectReceiver(InPlaceReceiver):
    """Receives one block's pages in place while they come in their order."""

    def __init__(self, block: RamBlock) -> None:
        """Before anything is stored in `block`."""
        self._block = block
        pages = block.length // block.page_size
        suitable = block.huge and block.page_size == TARGET_PAGE_SIZE and block.zeros().tolist() == [[0, pages]]
        self._end = pages if suitable else 0
        self._fresh = 0  # the pages from here on hold nothing but zeros
        self._begun = False  # something has come
        self._next: int | None = None  # the page expected next, after a run
        self._count = FIRST
        self._in_body = 0  # pages received in place since the body of the section began
        self._last_body = 0  # and in the one before
        self._lists = ListReceiver(block)

    @property
    def expects(self) -> bool:
        goes_on = self._next is not None and self._next == self._fresh
        return (goes_on or not self._begun) and self._fresh < self._end

    def end_body(self) -> None:
        self._last_body, self._in_body = self._in_body, 0

    def note_stored(self, pages: NDArray[np.int64]) -> None:
        self._begun = True
        self._fresh = max(self._fresh, int(pages.max()) + 1)
        last = int(pages[-1])
        self._next = last + 1 if len(pages) >= RUN and last - int(pages[-RUN]) == RUN - 1 else None

    def note_zeroed(self) -> None:
        self._begun = True
        self._next = None

    def receive(self, reader: StreamReader) -> bool:
        if self._next is None or not self.expects or not reader.receives_memory:
            return False
        start, end = reader.span()
        held = end - start
        if not held and self._last_body and self._in_body == self._last_body:
            return reader.fill(BOUNDARY)
        if not held:
            return self._receive_run(reader, self._next)
        if held < HEADER or held >= PAGE_RECORD or reader.buffer[start : start + HEADER] != _header_of(self._next):
            return False
        reader.skip(HEADER)
        self._finish_page(reader, self._next, 0)
        self._advance(1)
        return True

    def _receive_run(self, reader: StreamReader, first: int) -> bool:
        ram = self._block.pages  # held on to while the kernel writes there; empty when the block was closed
        most = min(MOST, len(reader.buffer) // PAGE_RECORD)
        total = len(ram) - first
        if self._in_body < self._last_body:
            most = min(most, max(FIRST, self._last_body // SHARE))
            total = min(total, self._last_body - self._in_body)
        if total <= 0 or most <= 0:
            return False
        whole, _, received = self._lists.receive(reader, ram, first, self._count, most, total)
        self._count = min(self._count + whole, MOST)  # as if it had doubled with each list
        self._advance(whole)
        return self._take_list(reader, ram[first + whole :], first + whole, received) or whole > 0

    def _take_list(self, reader: StreamReader, ram: NDArray[np.uint8], first: int, received: int) -> bool:
        """Deal with a list of pages from `first` on, of which so many bytes came into `ram`. False where something else
        came, or nothing."""
        records, part = divmod(received, PAGE_RECORD)
        right = self._lists.count_right(first, records)
        if right == records and 0 < part < HEADER:
            # Behind a page's record there is always a header. Behind anything else there may be nothing at all.
            reader.read_into(self._lists.header(records), "a RAM record's header", part)
            part = HEADER
        begun = records + (part > 0)
        if part and right == records:
            right = self._lists.count_right(first, begun)
        if right < begun:
            self._take_out(reader, ram[right:begun], right, (records - right) * PAGE_RECORD + part)
            self._count = FIRST
            self._advance(right)
            return False
        if part:
            self._finish_page(reader, first + records, part - HEADER)
        if begun:
            self._count = min(2 * self._count, MOST)
            self._advance(begun)
        return begun > 0

    def _advance(self, pages: int) -> None:
        self._in_body += pages
        self._fresh += pages
        self._next = self._fresh

    def _finish_page(self, reader: StreamReader, page: int, done: int) -> None:
        at = page * TARGET_PAGE_SIZE
        reader.read_into(self._block.view[at : at + TARGET_PAGE_SIZE], "a page", done)

    def _take_out(self, reader: StreamReader, pages: NDArray[np.uint8], right: int, count: int) -> None:
        """Give the records from the number `right` on, `count` bytes with these pages, back to the reader, and leave
        zeros in the pages."""
        rows = np.empty((len(pages), PAGE_RECORD), dtype=np.uint8)
        rows[:, :HEADER] = self._lists.headers[right : right + len(pages)].view(np.uint8).reshape(-1, HEADER)
        rows[:, HEADER:] = pages
        pages[:] = 0
        reader.unread(rows.data.cast("B")[:count])


def _header_of(page: int) -> bytes:
    return (page * TARGET_PAGE_SIZE | FLAGS).to_bytes(HEADER, "big")
