"""The source's half: which pages are dirty, and how they get onto the wire.

Invariant: a page's dirty mark is cleared when the dirty log is harvested, never when the page is sent; the mark that
says "send it" falls after the page was handed to the writer. So a write during the copy is in the next harvest, and
none is lost.

Threads: the migration thread; the statistics may be read from any.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import RamBlock
from corefw.memory.runs import Runs
from corefw.section import RamStatistics
from corefw.wire.constants import BE64, RamFlag
from corefw.wire.records import BlockEntry, write_block_list
from corefw.wire.stream import StreamWriter
from corefw_ram.records import PageWriter

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
        written = self.block.dirty_log.harvest()
        self.mark(written)
        return int((written[:, 1] - written[:, 0]).sum())

    def mark(self, written: Runs) -> None:
        """The guest has written these pages."""
        for first, end in written.tolist():
            self.dirty[first:end] = True
            self.hole[first:end] = False
        if len(written):
            self.dirty_count = int(np.count_nonzero(self.dirty))


class PageSaver:
    """Sends all blocks of a machine, again and again, until little enough is left."""

    def __init__(self, blocks: Sequence[RamBlock], statistics: RamStatistics) -> None:
        self._states = [BlockState(block) for block in blocks]
        self._statistics = statistics
        self._pages = self._page_writer(statistics)
        self._at = (0, 0)  # the block and page where the pass goes on
        self._rate_since = 0.0
        self._rate_pages = 0

    def _page_writer(self, statistics: RamStatistics) -> PageWriter:
        """For a stream in which no block has been named yet."""
        return PageWriter(max((state.block.page_size for state in self._states), default=4096), statistics)

    def setup(self, writer: StreamWriter, *, page_sizes: bool = False) -> None:
        """`page_sizes`: say which blocks have huge pages, as QEMU does with postcopy-ram."""
        blocks = [state.block for state in self._states]
        self._statistics.total_bytes = sum(block.length for block in blocks)
        self._statistics.page_size = blocks[0].page_size if blocks else 4096
        writer.be64(self._statistics.total_bytes | RamFlag.MEM_SIZE)
        sizes = [
            block.host_page_size if page_sizes and block.host_page_size != block.page_size else None for block in blocks
        ]
        write_block_list(
            writer, [BlockEntry(block.idstr, block.length, size) for block, size in zip(blocks, sizes, strict=True)]
        )
        for state in self._states:
            state.start()
        self._statistics.dirty_sync_count = 1
        self._rate_since = time.monotonic()
        self._count_remaining()
        writer.write(EOS)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        limit = writer.position + budget
        while self._statistics.remaining_bytes and writer.position < limit:
            self._send_window(writer, limit)
        writer.write(EOS)
        return not self._statistics.remaining_bytes

    def complete(self, writer: StreamWriter) -> None:
        """The guest is stopped: one last harvest, and everything goes."""
        self.harvest()
        while self._statistics.remaining_bytes:
            self._send_window(writer, None)
        writer.write(EOS)

    def cleanup(self) -> None:
        for state in self._states:
            state.block.dirty_log.stop()

    def harvest(self) -> None:
        """Read the dirty log: a new pass begins."""
        written = sum(state.harvest() for state in self._states)
        self._rate_pages += written
        self._statistics.dirtied += written
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
        sent = self._send(writer, index, todo, limit)
        if sent < len(todo):
            end = int(todo[sent])
        self._at = (index, end) if end < len(state.dirty) else ((index + 1) % len(self._states), 0)

    def _send(self, writer: StreamWriter, index: int, pages: NDArray[np.int64], limit: int | None) -> int:
        """Send these dirty pages of one block, up to `limit` but at least one; how many were sent."""
        if not len(pages):
            return 0
        state = self._states[index]
        sent = self._pages.send(writer, state.block, pages, state.hole[pages], limit)
        state.dirty[pages[:sent]] = False
        state.dirty_count -= sent
        self._statistics.remaining_bytes -= sent * state.block.page_size
        return sent
