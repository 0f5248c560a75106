"""The source's half of postcopy: what the destination must forget, and the pages that its guest waits for.

Two threads send: the migration thread what is left, and the return path's thread what is requested, if there is a
channel for that. Invariant: a page's mark falls before the page is written, and under the lock or, where compiled code
sends, atomically; so each page is sent by the one that cleared its mark. A page whose send failed is found again by
prepare_resume().

Threads: `request`, `send_requested` and `serve_requests` in the return path's thread, everything else in the migration
thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MachineError, StreamError
from corefw.machine import RamBlock
from corefw.memory.runs import Runs, bridge, runs_of_mask, widen
from corefw.section import RamStatistics
from corefw.wire.constants import TARGET_PAGE_SIZE, Command
from corefw.wire.records import discard_payload, discards, write_command
from corefw.wire.stream import StreamReader, StreamWriter
from corefw_ram.kernel import DirtyBlock, PageServer, find_kernel
from corefw_ram.records import PAGE_RECORD
from corefw_ram.release import Releasable
from corefw_ram.save import EOS, WINDOW, BlockState, PageSaver

NEAR: Final = 1 << 14
"""Runs of pages that are less than this apart are harvested in one call, which takes no longer than another call does
(64 MiB of guest RAM, 45 microseconds)."""


PIECE: Final = 128
"""Pages sent at once: a kernel without preemption lets no thread that has a requested page run before a send has
returned. Compiled code sends fewer."""
COMPILED: Final = 2048
"""Pages that compiled code sends before the interpreter looks at something else."""
MOMENT: Final = 0.01
"""Seconds to wait, when no page is left to be claimed, for those that are being sent in the other thread."""


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
            pages = _dirty(self._states[index], first, end)
            if len(pages):
                return index, pages
        return None

    def clear(self) -> None:
        """Forget all requests: the connection they came over has broken, and the destination asks again."""
        self._queue.clear()
        for queued in self._queued:
            queued[:] = False


def _dirty(state: BlockState, first: int, end: int) -> NDArray[np.int64]:
    """Which of these pages are still to be sent. Of a copy of their marks, since compiled code clears marks without the
    lock, and NumPy looks twice: when it finds fewer than it has counted, it also returns numbers of pages that do not
    exist."""
    return np.flatnonzero(state.dirty[first:end].copy()) + first


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
        self._counted = threading.Condition(self._lock)  # pages that were sent in the return path's thread
        self._requests = RequestQueue(self._states)
        self._clean: list[Runs] | None = None  # of each block, what prepare_postcopy() did not have forgotten
        self._sent_before: list[NDArray[np.bool_]] = []  # of each block, what was sent before the guest left
        self._in_postcopy = False
        self._settled = False
        self._releasable: Releasable | None = None
        self._urgent_statistics = RamStatistics()
        self._urgent_counted = (0, 0)
        self._urgent_pages = self._page_writer(self._urgent_statistics)
        self._left: dict[int, DirtyBlock] = {}  # blocks where compiled code claims pages
        self._server: PageServer | None = None  # for the same blocks

    # -- the switch ------------------------------------------------------------------------------------------------

    def prepare_postcopy(self, writer: StreamWriter) -> None:
        """The guest still runs, and will be stopped next: have the destination forget every page that is still to be
        sent (QEMU 10.0, ram_postcopy_send_discard_bitmap), and find out where to look for what it writes until then."""
        self.harvest()
        self._clean = []
        for state in self._states:
            dirty = widen(runs_of_mask(state.dirty), _host_pages(state.block))
            self._forget(writer, state, dirty)
            self._clean.append(bridge(runs_of_mask(~state.dirty), NEAR))
        self._count_remaining()
        self._restart()

    def begin_postcopy(self, writer: StreamWriter) -> None:
        """The guest is stopped, so every millisecond counts: have the destination forget what was written since
        prepare_postcopy(). Pages that were to be sent anyway are not looked at before _settle()."""
        if self._clean is None:
            self.prepare_postcopy(writer)
        assert self._clean is not None
        for state, clean in zip(self._states, self._clean, strict=True):
            written = state.block.dirty_log.harvest_within(clean)
            state.mark(written)
            self._statistics.dirtied += int((written[:, 1] - written[:, 0]).sum())
            self._forget(writer, state, widen(written, _host_pages(state.block)))
        self._leave_something(writer)
        self._count_remaining()
        if self._releasable is not None:
            self._sent_before = [~state.dirty for state in self._states]
        if self._states:  # whole pages of the host are claimed from here on
            index, page = self._at
            self._at = (index, page - page % _host_pages(self._states[index].block))
        self._in_postcopy = True

    def _forget(self, writer: StreamWriter, state: BlockState, runs: Runs) -> None:
        """These pages, whole ones of the host (QEMU 10.0, postcopy_chunk_hostpages), are to be sent."""
        for first, end in runs.tolist():
            state.dirty[first:end] = True
        for discard in discards(state.block.idstr, state.block.page_size, runs):
            write_command(writer, Command.POSTCOPY_RAM_DISCARD, discard_payload(discard))
        if len(runs):
            state.dirty_count = int(np.count_nonzero(state.dirty))

    def _leave_something(self, writer: StreamWriter) -> None:
        """Send one page once more if all of them were sent: a QEMU that gets no RAM_DISCARD at all refuses RUN, because
        postcopy_ram_prepare_discard resets its state (5.2 to 11.1)."""
        if self._states and not any(state.dirty_count for state in self._states):
            state = self._states[0]
            self._forget(writer, state, np.array([[0, _host_pages(state.block)]]))

    def _settle(self) -> None:
        """The guest runs on the destination: do what need not keep it stopped. Pages that were never touched when they
        were marked may have been written since."""
        if self._settled:
            return
        for index, state in enumerate(self._states):
            log = state.block.dirty_log
            try:
                written = log.harvest_within(bridge(runs_of_mask(state.dirty & state.hole), NEAR))
            except MachineError:  # the guest's process has ended, and the log with it
                written = np.array([[0, len(state.hole)]])
            log.stop()
            for first, end in written.tolist():
                state.hole[first:end] = False
            if self._releasable is not None:
                self._releasable.note_sent(index, np.flatnonzero(self._sent_before[index] & ~state.hole))
        self._sent_before = []
        with self._lock:
            self._settled = True
            self._use_kernel()

    def _use_kernel(self) -> None:
        """From now on let compiled code claim pages, where there is such. The caller holds the lock. Pages of a host
        with huge ones are claimed together, and so not by compiled code."""
        kernel = find_kernel()
        if kernel is None:
            return
        self._left = {
            index: kernel.DirtyBlock(
                ram=state.block.pages.ctypes.data,
                pages=len(state.dirty),
                dirty=state.dirty.ctypes.data,
                hole=state.hole.ctypes.data,
            )
            for index, state in enumerate(self._states)
            if _host_pages(state.block) == 1 and state.block.page_size == TARGET_PAGE_SIZE
        }
        self._server = kernel.PageServer({self._states[index].block.idstr: left for index, left in self._left.items()})

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
            pages = self._claim(index, _dirty(state, first, end))
            hole = state.hole[pages] & self._settled
        if len(pages) == 1:
            self._urgent_pages.send_page(writer, state.block, int(pages[0]), bool(hole[0]))
        elif len(pages):
            self._urgent_pages.send(writer, state.block, pages, hole, None)

    def serve_requests(self, reader: StreamReader, writer: StreamWriter, block: str) -> str:
        """Answer the requests that follow with compiled code, until something else comes: the block of the last one.
        `block` is that of the request before. Called in the return path's thread. Raises ChannelError."""
        with self._lock:
            server = self._server
        if server is None or not reader.receives_from_socket or not writer.sends_to_socket:
            return block
        server.asked = block
        memory = [(state.block.pages, state.dirty, state.hole) for state in self._states]  # held on to while it is used
        start, end = reader.span()
        while start == end and self._serve_some(server, reader, writer):
            start, end = reader.span()
        del memory
        return block if server.asked is None else server.asked

    def _serve_some(self, server: PageServer, reader: StreamReader, writer: StreamWriter) -> bool:
        """False at the end of the return path."""
        current, taken = self._urgent_pages.current, 0
        server.named = None if current is None else current.idstr

        def send(outgoing: int) -> int:
            nonlocal taken
            if not server.unfinished:
                taken = reader.receive_from_socket(partial(server.serve, outgoing=outgoing))
                reader.unread(server.left)
            if server.unfinished:
                server.finish(outgoing)
            return server.sent

        try:
            writer.send_to_socket(send)
        finally:
            self._count_served(server)
        return taken > 0

    def _count_served(self, server: PageServer) -> None:
        with self._lock:
            served = server.take()
            for idstr, count in served.claimed.items():
                self._count_claimed(self._states[self._index[idstr]], count)
            self._statistics.postcopy_requests += served.requests
            self._urgent_statistics.normal += sum(served.claimed.values()) - served.zeros
            self._urgent_statistics.duplicate += served.zeros
            self._counted.notify_all()
        if server.named is not None:
            self._urgent_pages.current = self._states[self._index[server.named]].block

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
        self._settle()
        while (found := self._next_requested()) is not None:
            self._write(writer, *found)
        limit = writer.position + budget
        while writer.position < limit:
            if not self._write_left(writer, max(1, (limit - writer.position) // PAGE_RECORD)):
                break
        writer.write(EOS)
        self._count_urgent()
        return not self._statistics.remaining_bytes

    def complete(self, writer: StreamWriter) -> None:
        if self._in_postcopy:
            self._settle()
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

    def _write_left(self, writer: StreamWriter, most: int) -> bool:
        """Send at most so many of the pages that are not requested; False if none is left."""
        left = self._left.get(self._at[0])
        if (
            left is not None
            and self._can_send_compiled(writer)
            and self._send_compiled(writer, left, min(COMPILED, most))
        ):
            return True
        found = self._next_left(min(PIECE, most))
        if found is not None:
            self._write(writer, *found)
        elif self._statistics.remaining_bytes:
            self._await_served()
        return found is not None

    def _await_served(self) -> None:
        """No page was found: wait a moment for those that compiled code sends in the return path's thread. It may have
        claimed all that was looked at, and others are left."""
        with self._lock:
            claiming = self._server is not None and self._server.claiming
            if self._statistics.remaining_bytes and not claiming and not any(one.dirty.any() for one in self._states):
                raise AssertionError(f"{self._statistics.remaining_bytes} bytes are to be sent, but no page is")
            self._counted.wait_for(lambda: not self._statistics.remaining_bytes, MOMENT)

    def _can_send_compiled(self, writer: StreamWriter) -> bool:
        """Whether compiled code can go on where the stream is: the record before has to be of the same block."""
        return writer.sends_to_socket and self._pages.current is self._states[self._at[0]].block

    def _send_compiled(self, writer: StreamWriter, left: DirtyBlock, most: int) -> bool:
        """Whether there was a page to send, up to the block's end."""
        index, first = self._at
        state, pages = self._states[index], self._states[index].block.pages  # held on to while they are sent
        left.begin(first, most)
        try:
            writer.send_to_socket(left.send)
            while not left.done:
                writer.send_to_socket(left.send)
        finally:
            sent = left.claimed
            with self._lock:
                self._count_claimed(state, len(sent))
                self._go_on_at(index, left.next)
            self._statistics.normal += len(sent) - left.zeros
            self._statistics.duplicate += left.zeros
            if self._releasable is not None:
                self._releasable.note_sent(index, sent)
            del pages
        return bool(len(sent))

    def _next_requested(self) -> tuple[int, NDArray[np.int64]] | None:
        """Claim the pages of the next request: a block's number and its pages. None if all were served."""
        with self._lock:
            while (request := self._requests.take()) is not None:
                index, pages = request
                pages = self._claim(index, pages)
                if len(pages):
                    self._go_on_at(index, int(pages[-1]) + 1)
                    return index, pages
            return None

    def _next_left(self, most: int) -> tuple[int, NDArray[np.int64]] | None:
        """The same for at most so many of the other pages. None if nothing is left."""
        with self._lock:
            for _ in range(self._windows):
                index, page = self._at
                count = _host_pages(self._states[index].block)
                most = max(most - most % count, count)
                end = min(page + max(WINDOW, count), len(self._states[index].dirty))
                pages = _dirty(self._states[index], page, end)[:most]
                self._go_on_at(index, int(pages[-1]) + 1 if len(pages) == most else end)
                pages = self._claim(index, pages)
                if len(pages):
                    return index, pages
            return None

    @property
    def _windows(self) -> int:
        """Windows that _next_left() looks at, at most, to see all pages."""
        return (
            sum(-(-len(state.dirty) // WINDOW) for state in self._states) + 1 if self._statistics.remaining_bytes else 0
        )

    def _claim(self, index: int, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of these pages, which are to be sent, those that the caller sends. It holds the lock."""
        state, left = self._states[index], self._left.get(index)
        if left is None:
            state.dirty[pages] = False
        else:
            pages = pages[left.claim(pages)]
        self._count_claimed(state, len(pages))
        return pages

    def _count_claimed(self, state: BlockState, count: int) -> None:
        state.dirty_count -= count
        self._statistics.remaining_bytes -= count * state.block.page_size

    def _go_on_at(self, index: int, page: int) -> None:
        """Let iterate() go on with this page, or with the next block at the end of this one."""
        self._at = (index, page) if page < len(self._states[index].dirty) else ((index + 1) % len(self._states), 0)

    # -- after the connection broke --------------------------------------------------------------------------------

    def prepare_resume(self, received: Callable[[str, int], NDArray[np.bool_]]) -> None:
        """What the destination has not received is to be sent, and nothing else (QEMU 10.0, ram_dirty_bitmap_reload).
        It asks again for the pages that its guest waits for."""
        self._settle()
        self._requests.clear()
        arrived = [received(state.block.idstr, len(state.dirty)) for state in self._states]
        with self._lock:
            for index, (state, here) in enumerate(zip(self._states, arrived, strict=True)):
                if self._releasable is not None:
                    self._releasable.note_received(index, here)
                state.dirty = ~here
                state.dirty_count = int(np.count_nonzero(state.dirty))
            self._count_remaining()
            self._restart()
            self._use_kernel()

    def _restart(self) -> None:
        """The next page over either channel is to name its block."""
        self._pages = self._page_writer(self._statistics)
        self._urgent_pages = self._page_writer(self._urgent_statistics)
