"""The source's half of postcopy: what the destination must forget, and the pages that its guest waits for.

Two threads send: the migration thread what is left, and the return path's thread what is requested, if there is a
channel for that. Invariant: a page's mark falls under the lock, before the page is written, so each page is sent by the
one that cleared its mark. A page whose send failed is found again by prepare_resume().

Threads: `request`, `send_requested` in the return path's thread, everything else in the migration thread.
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
from corefw_ram.records import PAGE_RECORD
from corefw_ram.release import Releasable
from corefw_ram.save import EOS, WINDOW, BlockState, PageSaver


class RequestQueue:
    """The pages that the destination has asked for, in the order of its requests.

    A page is kept once however often it is asked for, so a destination that floods the source with requests makes it
    remember no more than a bit per page and an entry per run. The caller holds a lock.
    """

    def __init__(self, states: Sequence[BlockState]) -> None:
        self._states = states
        self._queue: deque[tuple[int, int, int]] = deque()  # block, first page, end
        self._queued = [np.zeros(len(state.dirty), dtype=np.bool_) for state in states]

    def add(self, index: int, first: int, end: int) -> None:
        if not self._queued[index][first:end].all():
            self._queued[index][first:end] = True
            self._queue.append((index, first, end))

    def take(self) -> tuple[int, NDArray[np.int64]] | None:
        """The next request: the number of its block, and those of its pages that are still to be sent, at least one.
        None when all requests were served."""
        while self._queue:
            index, first, end = self._queue.popleft()
            self._queued[index][first:end] = False
            pages = np.flatnonzero(self._states[index].dirty[first:end]) + first
            if len(pages):
                return index, pages
        return None

    def clear(self) -> None:
        """Forget all requests: the connection they came over has broken, and the destination asks again."""
        self._queue.clear()
        for queued in self._queued:
            queued[:] = False


def _host_pages(block: RamBlock) -> int:
    """Pages of the stream in one page of the guest's host."""
    return block.host_page_size // block.page_size


class PostcopyPageSaver(PageSaver):
    """Sends all blocks in passes; after begin_postcopy() pages that were requested first, and what follows them next:
    the guest is likely to need that too."""

    def __init__(self, blocks: Sequence[RamBlock], statistics: RamStatistics) -> None:
        super().__init__(blocks, statistics)
        self._index = {state.block.idstr: index for index, state in enumerate(self._states)}
        self._lock = threading.Lock()  # guards the marks, what is counted of them, the queue, and where to go on
        self._requests = RequestQueue(self._states)
        self._in_postcopy = False
        self._releasable: Releasable | None = None
        self._urgent_statistics = RamStatistics()
        self._urgent_counted = (0, 0)
        self._urgent_pages = self._page_writer(self._urgent_statistics)

    def begin_postcopy(self, writer: StreamWriter) -> None:
        """The guest is stopped: have the destination forget every page that is still to be sent (QEMU 10.0,
        ram_postcopy_send_discard_bitmap)."""
        self.harvest()
        self._leave_something()
        self._round_out()
        for index, state in enumerate(self._states):
            state.block.dirty_log.stop()
            for discard in discards(state.block.idstr, state.block.page_size, runs_of_mask(state.dirty)):
                write_command(writer, Command.POSTCOPY_RAM_DISCARD, discard_payload(discard))
            if self._releasable is not None:
                self._releasable.note_sent(index, np.flatnonzero(~state.dirty & ~state.hole))
        self._in_postcopy = True
        self._restart()

    def _leave_something(self) -> None:
        """Send one page once more if all of them were sent: a QEMU that gets no RAM_DISCARD at all refuses RUN, because
        postcopy_ram_prepare_discard resets its state (5.2 to 11.1)."""
        if self._states and not any(state.dirty_count for state in self._states):
            state = self._states[0]
            state.dirty[0] = True
            state.dirty_count = 1
            self._count_remaining()

    def _round_out(self) -> None:
        """Mark whole pages of the host, and go on with a whole one (QEMU 10.0, postcopy_chunk_hostpages). From here on
        they are claimed as a whole."""
        for state in self._states:
            if (count := _host_pages(state.block)) > 1:
                whole = state.dirty.reshape(-1, count)
                whole |= whole.any(axis=1, keepdims=True)
                state.dirty_count = int(np.count_nonzero(state.dirty))
        if self._states:
            index, page = self._at
            self._at = (index, page - page % _host_pages(self._states[index].block))
        self._count_remaining()

    def releasing(self) -> Releasable:
        """What of the memory can be given back; from the first call on it is noted what was sent."""
        if self._releasable is None:
            self._releasable = Releasable(self._states)
        return self._releasable

    # -- what is requested -----------------------------------------------------------------------------------------

    def request(self, idstr: str, start: int, length: int) -> None:
        """Let iterate() send these bytes next. Called in the return path's thread. Raises StreamError."""
        index, first, end = self._requested(idstr, start, length)
        with self._lock:
            self._requests.add(index, first, end)
            self._statistics.postcopy_requests += 1

    def send_requested(self, writer: StreamWriter, idstr: str, start: int, length: int) -> None:
        """Send what of these bytes is still to be sent, over a channel of its own. Called in the return path's thread.
        Raises StreamError, ChannelError."""
        index, first, end = self._requested(idstr, start, length)
        state = self._states[index]
        with self._lock:
            self._statistics.postcopy_requests += 1
            pages = np.flatnonzero(state.dirty[first:end]) + first
            self._claim(index, pages)
            self._go_on_at(index, end)
        if len(pages) == 1:
            self._urgent_pages.send_page(writer, state.block, int(pages[0]), bool(state.hole[pages[0]]))
        elif len(pages):
            self._urgent_pages.send(writer, state.block, pages, state.hole[pages], None)

    def _requested(self, idstr: str, start: int, length: int) -> tuple[int, int, int]:
        """A block's number, and the first page and the end of these bytes of it. Raises StreamError for anything but
        whole pages of a block."""
        index = self._index.get(idstr)
        if index is None:
            raise StreamError(f"page request: expected one of the RAM blocks {', '.join(self._index)}, got '{idstr}'")
        block = self._states[index].block
        if length <= 0 or start % block.page_size or length % block.page_size or start + length > block.length:
            raise StreamError(
                f"page request: expected whole pages within the {block.length} bytes of RAM block '{idstr}',"
                f" got {length} bytes at {start:#x}"
            )
        first, end, count = start // block.page_size, (start + length) // block.page_size, _host_pages(block)
        return index, first - first % count, end + -end % count

    # -- what is left ----------------------------------------------------------------------------------------------

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        if not self._in_postcopy:
            return super().iterate(writer, budget)
        while (found := self._next_requested()) is not None:
            self._write(writer, *found)
        limit = writer.position + budget
        while writer.position < limit:
            found = self._next_left(max(1, (limit - writer.position) // PAGE_RECORD))
            if found is None:
                break
            self._write(writer, *found)
        writer.write(EOS)
        self._count_urgent()
        return not self._statistics.remaining_bytes

    def complete(self, writer: StreamWriter) -> None:
        super().complete(writer)
        self._count_urgent()

    def _count_urgent(self) -> None:
        """Add the pages that went over their own channel. They are counted apart, since that is another thread's."""
        normal, duplicate = self._urgent_statistics.normal, self._urgent_statistics.duplicate
        before = self._urgent_counted
        self._statistics.normal += normal - before[0]
        self._statistics.duplicate += duplicate - before[1]
        self._urgent_counted = (normal, duplicate)

    def _write(self, writer: StreamWriter, index: int, pages: NDArray[np.int64]) -> None:
        state = self._states[index]
        self._pages.send(writer, state.block, pages, state.hole[pages], None)
        if self._releasable is not None:
            self._releasable.note_sent(index, pages)

    def _next_requested(self) -> tuple[int, NDArray[np.int64]] | None:
        """Claim the pages of the next request: a block's number and its pages. None if all were served."""
        with self._lock:
            request = self._requests.take()
            if request is not None:
                index, pages = request
                self._claim(index, pages)
                self._go_on_at(index, int(pages[-1]) + 1)
            return request

    def _next_left(self, most: int) -> tuple[int, NDArray[np.int64]] | None:
        """The same for at most so many of the other pages. None if nothing is left."""
        with self._lock:
            while self._statistics.remaining_bytes:
                index, page = self._at
                count = _host_pages(self._states[index].block)
                most = max(most - most % count, count)
                end = min(page + max(WINDOW, count), len(self._states[index].dirty))
                pages = np.flatnonzero(self._states[index].dirty[page:end])[:most] + page
                self._go_on_at(index, int(pages[-1]) + 1 if len(pages) == most else end)
                if len(pages):
                    self._claim(index, pages)
                    return index, pages
            return None

    def _claim(self, index: int, pages: NDArray[np.int64]) -> None:
        """These pages, which are to be sent, are sent by the caller."""
        state = self._states[index]
        state.dirty[pages] = False
        state.dirty_count -= len(pages)
        self._statistics.remaining_bytes -= len(pages) * state.block.page_size

    def _go_on_at(self, index: int, page: int) -> None:
        """Let iterate() go on with this page, or with the next block at the end of this one."""
        self._at = (index, page) if page < len(self._states[index].dirty) else ((index + 1) % len(self._states), 0)

    # -- after the connection broke --------------------------------------------------------------------------------

    def prepare_resume(self, received: Callable[[str, int], NDArray[np.bool_]]) -> None:
        """What the destination has not received is to be sent, and nothing else (QEMU 10.0, ram_dirty_bitmap_reload).
        It asks again for the pages that its guest waits for."""
        self._requests.clear()
        for index, state in enumerate(self._states):
            here = received(state.block.idstr, len(state.dirty))
            if self._releasable is not None:
                self._releasable.note_received(index, here)
            state.dirty = ~here
            state.dirty_count = int(np.count_nonzero(state.dirty))
        self._count_remaining()
        self._restart()

    def _restart(self) -> None:
        """The next page over either channel is to name its block."""
        self._pages = self._page_writer(self._statistics)
        self._urgent_pages = self._page_writer(self._urgent_statistics)
