"""The source's half of postcopy: what the destination must forget, and the pages that its guest waits for.

Threads: `add` and `request` are called in the return path's thread, everything else in the migration thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from corefw.errors import StreamError
from corefw.machine import RamBlock
from corefw.memory.runs import runs_of_mask
from corefw.section import RamStatistics
from corefw.wire.constants import Command
from corefw.wire.records import discard_payload, discards, write_command
from corefw.wire.stream import StreamWriter
from corefw_ram.save import BlockState, PageSaver


class RequestQueue:
    """The pages that the destination has asked for, in the order of its requests.

    A page is kept once however often it is asked for, so a destination that floods the source with requests makes it
    remember no more than a bit per page and an entry per run.
    """

    def __init__(self, states: Sequence[BlockState]) -> None:
        self._states = states
        self._index = {state.block.idstr: index for index, state in enumerate(states)}
        self._lock = threading.Lock()
        self._queue: deque[tuple[int, int, int]] = deque()  # block, first page, end
        self._queued = [np.zeros(len(state.dirty), dtype=np.bool_) for state in states]

    def add(self, idstr: str, start: int, length: int) -> None:
        """Add the pages from byte `start` on. Raises StreamError for anything but whole pages of a block."""
        index = self._index.get(idstr)
        if index is None:
            raise StreamError(f"page request: expected one of the RAM blocks {', '.join(self._index)}, got '{idstr}'")
        block = self._states[index].block
        if length <= 0 or start % block.page_size or length % block.page_size or start + length > block.length:
            raise StreamError(
                f"page request: expected whole pages within the {block.length} bytes of RAM block '{idstr}',"
                f" got {length} bytes at {start:#x}"
            )
        first, end = start // block.page_size, (start + length) // block.page_size
        with self._lock:
            if not self._queued[index][first:end].all():
                self._queued[index][first:end] = True
                self._queue.append((index, first, end))

    def take(self) -> tuple[int, NDArray[np.int64]] | None:
        """The next request: the number of its block, and those of its pages that are still to be sent, at least one.
        None when all requests were served."""
        while True:
            with self._lock:
                if not self._queue:
                    return None
                index, first, end = self._queue.popleft()
                self._queued[index][first:end] = False
            pages = np.flatnonzero(self._states[index].dirty[first:end]) + first
            if len(pages):
                return index, pages

    def clear(self) -> None:
        """Forget all requests: the connection they came over has broken, and the destination asks again."""
        with self._lock:
            self._queue.clear()
            for queued in self._queued:
                queued[:] = False


class PostcopyPageSaver(PageSaver):
    """Sends all blocks in passes; after begin_postcopy() pages that were requested first, and what follows them next:
    the guest is likely to need that too."""

    def __init__(self, blocks: Sequence[RamBlock], statistics: RamStatistics) -> None:
        super().__init__(blocks, statistics)
        self._requests = RequestQueue(self._states)

    def begin_postcopy(self, writer: StreamWriter) -> None:
        """The guest is stopped: have the destination forget every page that is still to be sent (QEMU 10.0,
        ram_postcopy_send_discard_bitmap)."""
        self.harvest()
        for state in self._states:
            state.block.dirty_log.stop()
            for discard in discards(state.block.idstr, state.block.page_size, runs_of_mask(state.dirty)):
                write_command(writer, Command.POSTCOPY_RAM_DISCARD, discard_payload(discard))
        self._restart()

    def request(self, block: str, start: int, length: int) -> None:
        """Called in the return path's thread. Raises StreamError."""
        self._requests.add(block, start, length)
        self._statistics.postcopy_requests += 1

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        while (request := self._requests.take()) is not None:
            index, pages = request
            self._send(writer, index, pages, None)
            self._at = (index, int(pages[-1]))
        return super().iterate(writer, budget)

    def prepare_resume(self, received: Callable[[str, int], NDArray[np.bool_]]) -> None:
        """What the destination has not received is to be sent, and nothing else (QEMU 10.0, ram_dirty_bitmap_reload).
        It asks again for the pages that its guest waits for."""
        self._requests.clear()
        for state in self._states:
            state.dirty = ~received(state.block.idstr, len(state.dirty))
            state.dirty_count = int(np.count_nonzero(state.dirty))
        self._count_remaining()
        self._restart()

    def _restart(self) -> None:
        """The next page is to name its block."""
        self._pages = self._page_writer()
