"""The source's half: which pages are dirty, and how they get onto the wire.

The law: a page's dirty mark is cleared when the dirty log is harvested, never when the page is sent; the mark that says
"send it" falls after the page was handed to the writer. So a write during the copy is in the next harvest, and none is
lost.

Pages travel in batches: one copy into a staging buffer that fits the processor's cache, interleaved with their records'
headers, found to be zero or not on the way, and then one send. Nothing here runs once a page in Python.

Threads: the migration thread; the statistics may be read from any.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import NotesSentPages, RamBlock
from corefw.section import RamStatistics
from corefw.wire.constants import BE64, RamFlag
from corefw.wire.records import BlockEntry, write_block_list
from corefw.wire.stream import StreamWriter

HEADER: Final = 8
ZERO_RECORD: Final = 9
BATCH: Final = 128
"""Pages copied and sent at once: 513 KiB of staging, half of a usual L2 cache."""
WINDOW: Final = 1 << 15
"""Pages whose dirty marks are looked through at once (128 MiB of guest RAM)."""
RATE_PERIOD: Final = 0.1
"""Seconds that a dirty rate is measured over, at least."""

EOS: Final = BE64.pack(RamFlag.EOS)


class BlockState:
    """One block's marks: `dirty` (to be sent) and `hole` (never touched: zero, and not to be read), a bool a page."""

    def __init__(self, block: RamBlock) -> None:
        self.block = block
        pages = block.length // block.page_size
        self.dirty: NDArray[np.bool_] = np.ones(pages, dtype=np.bool_)
        self.hole: NDArray[np.bool_] = np.zeros(pages, dtype=np.bool_)
        self.dirty_count = pages

    def start(self) -> None:
        """Begin to log. What is a hole now and is written later shows in the log, so holes are looked for after."""
        self.block.dirty_log.start()
        for first, end in self.block.holes():
            self.hole[first:end] = True

    def harvest(self) -> int:
        """Mark what was written since the last time; how many pages that was."""
        written = 0
        for first, end in self.block.dirty_log.harvest():
            self.dirty[first:end] = True
            self.hole[first:end] = False
            written += int(end - first)
        if written:
            self.dirty_count = int(np.count_nonzero(self.dirty))
        return written


class RamSaver:
    """Sends all blocks of a machine, again and again, until little enough is left."""

    def __init__(self, blocks: Sequence[RamBlock], statistics: RamStatistics) -> None:
        self._states = [BlockState(block) for block in blocks]
        self._statistics = statistics
        self._pages = _PageWriter(max((block.page_size for block in blocks), default=4096), statistics)
        self._at = (0, 0)  # the block and page where the pass goes on
        self._rate_since = 0.0
        self._rate_pages = 0

    def setup(self, writer: StreamWriter) -> None:
        blocks = [state.block for state in self._states]
        self._statistics.total_bytes = sum(block.length for block in blocks)
        self._statistics.page_size = blocks[0].page_size if blocks else 4096
        writer.be64(self._statistics.total_bytes | RamFlag.MEM_SIZE)
        write_block_list(writer, [BlockEntry(block.idstr, block.length) for block in blocks])
        for state in self._states:
            state.start()
        self._statistics.dirty_sync_count = 1
        self._rate_since = time.monotonic()
        self._count_remaining()
        writer.write(EOS)

    def pending(self, threshold: int) -> int:
        """Bytes left; the dirty log is harvested when the known rest is at most `threshold`."""
        if self._statistics.remaining_bytes <= threshold:
            self._harvest()
        return self._statistics.remaining_bytes

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        limit = writer.position + budget
        while self._statistics.remaining_bytes and writer.position < limit:
            self._send_window(writer, limit)
        writer.write(EOS)
        return not self._statistics.remaining_bytes

    def complete(self, writer: StreamWriter) -> None:
        """The guest is stopped: one last harvest, and everything goes."""
        self._harvest()
        while self._statistics.remaining_bytes:
            self._send_window(writer, None)
        writer.write(EOS)

    def cleanup(self) -> None:
        for state in self._states:
            state.block.dirty_log.stop()

    def _harvest(self) -> None:
        self._rate_pages += sum(state.harvest() for state in self._states)
        self._statistics.dirty_sync_count += 1
        self._count_remaining()
        now = time.monotonic()
        if now - self._rate_since >= RATE_PERIOD:
            self._statistics.dirty_pages_rate = int(self._rate_pages / (now - self._rate_since))
            self._rate_since, self._rate_pages = now, 0

    def _count_remaining(self) -> None:
        self._statistics.remaining_bytes = sum(state.dirty_count * state.block.page_size for state in self._states)

    def _send_window(self, writer: StreamWriter, limit: int | None) -> None:
        """Send the dirty pages of the next window, or of the part of it up to which `limit` (a position) lets us."""
        index, page = self._at
        state = self._states[index]
        end = min(page + WINDOW, len(state.dirty))
        todo = np.flatnonzero(state.dirty[page:end]) + page
        sent = self._pages.send(writer, state, todo, limit) if len(todo) else 0
        if sent < len(todo):
            end = int(todo[sent])
            todo = todo[:sent]
        state.dirty[todo] = False
        state.dirty_count -= sent
        self._statistics.remaining_bytes -= sent * state.block.page_size
        self._at = (index, end) if end < len(state.dirty) else ((index + 1) % len(self._states), 0)


class _PageWriter:
    """Turns page numbers into records on the wire. Its buffers are made once."""

    def __init__(self, page_size: int, statistics: RamStatistics) -> None:
        self._page_size = page_size
        self._statistics = statistics
        self._staging = np.empty((BATCH, HEADER + page_size), dtype=np.uint8)
        self._current: RamBlock | None = None
        self._notes: NotesSentPages | None = None

    def send(self, writer: StreamWriter, state: BlockState, pages: NDArray[np.int64], limit: int | None) -> int:
        """Send these pages of one block, up to the position `limit` but at least one; how many went."""
        log = state.block.dirty_log
        self._notes = log if isinstance(log, NotesSentPages) else None
        if state.hole[pages].all():
            pages = pages[: _room(writer, limit, ZERO_RECORD, len(pages))]
            self._send_zeros(writer, state.block, pages)
            return len(pages)
        at = 0
        while at < len(pages) and (not at or limit is None or writer.position < limit):
            batch = pages[at : at + _room(writer, limit, HEADER + self._page_size, BATCH)]
            at += len(batch)
            hole = state.hole[batch]
            if hole.any():
                self._send_zeros(writer, state.block, batch[hole])
                batch = batch[~hole]
            if len(batch):
                self._send_batch(writer, state.block, batch)
        return at

    def _send_batch(self, writer: StreamWriter, block: RamBlock, pages: NDArray[np.int64]) -> None:
        count = len(pages)
        first, end = int(pages[0]), int(pages[-1]) + 1
        rows = self._staging[:count]
        rows[:, HEADER:] = block.pages[first:end] if end - first == count else block.pages[pages]
        if self._notes is not None:
            self._notes.sent(pages, rows[:, HEADER:])
        zero = _zero_rows(rows)
        if zero is not None:
            self._send_zeros(writer, block, pages[zero])
            pages = pages[~zero]
            count = len(pages)
            if not count:
                return
            self._staging[:count, HEADER:] = rows[~zero, HEADER:]
            rows = self._staging[:count]
        self._put_headers(rows, block, pages, RamFlag.PAGE)
        if self._current is not block:
            self._introduce(writer, block, rows[0, :HEADER].tobytes())
            writer.payload(rows.data.cast("B")[HEADER:])
        else:
            writer.payload(rows.data.cast("B"))
        self._statistics.normal += count

    def _send_zeros(self, writer: StreamWriter, block: RamBlock, pages: NDArray[np.int64]) -> None:
        records = np.zeros((len(pages), ZERO_RECORD), dtype=np.uint8)
        self._put_headers(records, block, pages, RamFlag.ZERO)
        if self._current is not block:
            self._introduce(writer, block, records[0, :HEADER].tobytes())
            writer.write(records.data.cast("B")[HEADER:])
        else:
            writer.write(records.data.cast("B"))
        self._statistics.duplicate += len(pages)

    def _put_headers(self, rows: NDArray[np.uint8], block: RamBlock, pages: NDArray[np.int64], flag: RamFlag) -> None:
        """The u64 in front of each record; CONTINUE says "the same block as before", so the first one may lack it."""
        headers = (pages * self._page_size | int(flag | RamFlag.CONTINUE)).astype(">u8")
        if self._current is not block:
            headers[0] ^= int(RamFlag.CONTINUE)
        rows[:, :HEADER] = headers.view(np.uint8).reshape(len(pages), HEADER)

    def _introduce(self, writer: StreamWriter, block: RamBlock, header: bytes) -> None:
        """A record without CONTINUE has the block's name behind its header."""
        writer.write(header)
        writer.string(block.idstr)
        self._current = block


def _room(writer: StreamWriter, limit: int | None, size: int, most: int) -> int:
    """How many records of `size` bytes fit under the limit, 1 to `most`: max-bandwidth may allow a step less than
    a batch."""
    return most if limit is None else min(most, max(1, (limit - writer.position) // size))


def _zero_rows(rows: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Which staged pages are all zero; None when none is. Most pages are told by their first word."""
    words = rows.view(np.uint64)  # a row is a whole number of words, the header is the first
    suspects = np.flatnonzero(words[:, 1] == 0)
    if not len(suspects):
        return None
    picked = words[:, 1:] if len(suspects) == len(rows) else words[suspects, 1:]
    zero = np.zeros(len(rows), dtype=np.bool_)
    zero[suspects] = ~picked.any(axis=1)
    return zero if zero.any() else None
