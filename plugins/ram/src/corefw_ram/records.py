"""Page numbers to records on the wire.

Pages travel in batches; nothing here runs once a page in Python. Which of a batch are zero is looked up in each page's
first word, and in the whole page only where that and a few others are zero. Of a large batch a sample is looked at
first, and without a zero in it all pages are sent whole: the first touch of a page costs a miss of the processor's
cache, in all a sixth of the source's time, and few zero pages are cheaper sent than found.

Two ways to the channel:

    gathered   over a channel that sends memory from where it is: headers and guest pages in one list of pieces
    staged     over any other, and where a dirty log has to know exactly what was sent: copied between the headers into
               a buffer that fits the processor's cache

docs/decisions/staging.md has what each costs.

Threads: the migration thread.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import ComparingLog, RamBlock
from corefw.section import RamStatistics
from corefw.wire.constants import TARGET_PAGE_SIZE, RamFlag
from corefw.wire.stream import StreamWriter

HEADER: Final = 8
PAGE_RECORD: Final = HEADER + TARGET_PAGE_SIZE
ZERO_RECORD: Final = HEADER + 1
STAGED: Final = 128
"""Pages copied and sent at once: 513 KiB, half of a usual L2 cache."""
GATHERED: Final = 8192
"""Pages listed at once (32 MiB of guest RAM, 320 KiB of headers and pieces). Python's own work falls on each list, and
is slow where a processor's cache holds nothing but pages: with 512 in a list it was a third of the source's time."""

SAMPLED: Final = 16
"""Of so many pages of a large batch one is looked at."""
LARGE: Final = 1024
"""Pages in a batch that is sampled first."""

Index = slice | NDArray[np.int64]


class PageWriter:
    """For one migration; its buffers are made once."""

    def __init__(self, page_size: int, statistics: RamStatistics) -> None:
        self._page_size = page_size
        self._statistics = statistics
        self._current: RamBlock | None = None
        self._staging = np.empty((STAGED, HEADER + page_size), dtype=np.uint8)
        self._headers = np.empty((GATHERED, HEADER), dtype=np.uint8)
        self._pieces = np.empty((2 * GATHERED, 2), dtype=np.uint64)
        self._pieces[0::2, 0] = self._headers.ctypes.data + HEADER * np.arange(GATHERED)
        self._pieces[0::2, 1] = HEADER
        self._pieces[1::2, 1] = page_size

    @property
    def current(self) -> RamBlock | None:
        """The block of the record before, with which the next one may go on."""
        return self._current

    @current.setter
    def current(self, block: RamBlock) -> None:
        """Another has written a record of this block."""
        self._current = block

    def send(
        self,
        writer: StreamWriter,
        block: RamBlock,
        pages: NDArray[np.int64],
        hole: NDArray[np.bool_],
        limit: int | None,
    ) -> int:
        """Send these pages of one block, up to the position `limit` but at least one; how many went. `hole` says which
        of them were never touched: they are zero, and not to be read."""
        if hole.all():
            pages = pages[: _room(writer, limit, ZERO_RECORD, len(pages))]
            self._send_zeros(writer, block, pages)
            return len(pages)
        notes = block.dirty_log if isinstance(block.dirty_log, ComparingLog) else None
        gathered = writer.sends_memory and notes is None
        most = GATHERED if gathered else STAGED
        at = 0
        while at < len(pages) and (not at or limit is None or writer.position < limit):
            batch = slice(at, at + _room(writer, limit, HEADER + self._page_size, most))
            at += len(pages[batch])
            if gathered:
                self._send_gathered(writer, block, pages[batch], hole[batch])
            else:
                self._send_staged(writer, block, pages[batch], hole[batch], notes)
        return at

    def send_page(self, writer: StreamWriter, block: RamBlock, page: int, hole: bool) -> None:
        """The same for a single page, in a fraction of the time. A guest waits for it."""
        zero = hole or not block.pages[page].any()
        same = self._current is block
        flags = int(RamFlag.ZERO if zero else RamFlag.PAGE) | (int(RamFlag.CONTINUE) if same else 0)
        at = page * self._page_size
        writer.be64(at | flags)
        if not same:
            writer.string(block.idstr)
            self._current = block
        if zero:
            writer.u8(0)
            self._statistics.duplicate += 1
        else:
            writer.payload(block.view[at : at + self._page_size])
            self._statistics.normal += 1

    def _send_gathered(
        self, writer: StreamWriter, block: RamBlock, pages: NDArray[np.int64], hole: NDArray[np.bool_]
    ) -> None:
        zero = hole.copy()
        if not hole.any():
            zero = self._find_some_zeros(block, pages)
        elif not hole.all():
            zero[~hole] = self._find_some_zeros(block, pages[~hole])
        if zero.any():
            self._send_zeros(writer, block, pages[zero])
            pages = pages[~zero]
        if len(pages) == 0:
            return
        count = len(pages)
        self._put_headers(self._headers[:count], block, pages, int(RamFlag.PAGE))
        self._pieces[1 : 2 * count : 2, 0] = pages * self._page_size + block.pages.ctypes.data
        first = self._introduce(writer, block, self._headers[0])
        writer.memory(self._pieces[first : 2 * count], count * (HEADER + self._page_size) - first * HEADER)
        self._statistics.normal += count

    def _find_some_zeros(self, block: RamBlock, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these pages are zero; none where they are too few to be worth a look at every page."""
        words = block.pages.view(np.uint64)
        if len(pages) >= LARGE:
            groups = np.arange(0, len(pages) - SAMPLED + 1, SAMPLED)
            chosen = np.frombuffer(os.urandom(len(groups)), dtype=np.uint8) % SAMPLED
            sample = pages[groups + chosen]
            if words[sample, 0].all():
                return np.zeros(len(pages), dtype=np.bool_)
        return _find_zeros(words, _index(pages))

    def _send_staged(
        self,
        writer: StreamWriter,
        block: RamBlock,
        pages: NDArray[np.int64],
        hole: NDArray[np.bool_],
        notes: ComparingLog | None,
    ) -> None:
        """In the order of their addresses, zero pages among the others: tools that read stored streams count on it."""
        rows = self._staging[: len(pages)]
        read: Index = np.flatnonzero(~hole) if hole.any() else slice(0, len(pages))
        zero = hole.copy()
        if len(there := pages[read]):
            rows[read, HEADER:] = block.pages[_index(there)]
            if notes is not None:
                notes.sent(there, rows[read, HEADER:])
            # A row is a whole number of words, the header is the first.
            zero[read] = _find_zeros(rows.view(np.uint64)[:, 1:], read)
        if zero.any():
            self._put_headers(rows, block, pages, np.where(zero, int(RamFlag.ZERO), int(RamFlag.PAGE)))
            size = self._close_gaps(rows, zero)
        else:
            self._put_headers(rows, block, pages, int(RamFlag.PAGE))
            size = rows.size
        count = int(np.count_nonzero(zero))
        data = self._staging.reshape(-1)[:size]
        first = self._introduce(writer, block, data[:HEADER])
        (writer.write if count == len(pages) else writer.payload)(data.data[first * HEADER :])
        self._statistics.normal += len(pages) - count
        self._statistics.duplicate += count

    def _close_gaps(self, rows: NDArray[np.uint8], zero: NDArray[np.bool_]) -> int:
        """Shorten the rows of zero pages to records of header and fill byte; the bytes of all records, from the
        buffer's start on."""
        rows[zero, HEADER] = 0  # what stands there of a page that was not read is old
        data, row, size = self._staging.reshape(-1), self._staging.shape[1], 0
        edges = np.flatnonzero(zero[1:] != zero[:-1]) + 1
        for first, end in pairwise((0, *edges.tolist(), len(zero))):
            run = rows[first:end, :ZERO_RECORD].ravel() if zero[first] else data[first * row : end * row]
            data[size : size + len(run)] = run
            size += len(run)
        return size

    def _send_zeros(self, writer: StreamWriter, block: RamBlock, pages: NDArray[np.int64]) -> None:
        records = np.zeros((len(pages), ZERO_RECORD), dtype=np.uint8)
        self._put_headers(records, block, pages, int(RamFlag.ZERO))
        first = self._introduce(writer, block, records[0, :HEADER])
        writer.write(records.data.cast("B")[first * HEADER :])
        self._statistics.duplicate += len(pages)

    def _put_headers(
        self, rows: NDArray[np.uint8], block: RamBlock, pages: NDArray[np.int64], flags: int | NDArray[np.int64]
    ) -> None:
        """The u64 in front of each record; CONTINUE says "the same block as before", so the first one may lack it."""
        headers = (pages * self._page_size | flags | int(RamFlag.CONTINUE)).astype(">u8")
        if self._current is not block:
            headers[0] ^= int(RamFlag.CONTINUE)
        rows[:, :HEADER] = headers.view(np.uint8).reshape(len(pages), HEADER)

    def _introduce(self, writer: StreamWriter, block: RamBlock, header: NDArray[np.uint8]) -> int:
        """A record without CONTINUE has the block's name behind its header: write both. How many headers that were."""
        if self._current is block:
            return 0
        writer.write(header.tobytes())
        writer.string(block.idstr)
        self._current = block
        return 1


def _find_zeros(words: NDArray[np.uint64], where: Index) -> NDArray[np.bool_]:
    """Which of the pages in these rows are zero. Nearly all that are not show it in one of four words: a page may well
    begin with a counter that is zero, and while pages are read here from end to end the receiver waits."""
    first = words[where, 0]
    zero = np.zeros(len(first), dtype=np.bool_)
    suspects = np.flatnonzero(first == 0)
    rows = suspects + where.start if isinstance(where, slice) else where[suspects]
    for word in (words.shape[1] - 1, words.shape[1] // 2, 1):
        left = words[rows, word] == 0
        suspects, rows = suspects[left], rows[left]
    for at in range(0, len(suspects), STAGED):
        some = slice(at, at + STAGED)
        zero[suspects[some]] = ~words[_index(rows[some])].any(axis=1)
    return zero


def _index(pages: NDArray[np.int64]) -> Index:
    """What takes these pages, which are in ascending order, out of a block's array: no copy where they are a run."""
    first, end = int(pages[0]), int(pages[-1]) + 1
    return slice(first, end) if end - first == len(pages) else pages


def _room(writer: StreamWriter, limit: int | None, size: int, most: int) -> int:
    """How many records of `size` bytes reach the limit, 1 to `most`: max-bandwidth may allow a step less than a batch.
    Rounded up, since the rest would be a batch of a single page, and a system call of its own."""
    return most if limit is None else min(most, max(1, -(-(limit - writer.position) // size)))
