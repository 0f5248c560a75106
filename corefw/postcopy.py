"""Savers and loaders of sections whose rest follows in postcopy, while the guest already runs on the destination.

    PostcopySaver    PostcopyLoader    the rest follows (dirty bitmaps)
    OnDemandSaver    OnDemandLoader    the guest may wait for it: requested pages go first (RAM)
    PreemptSaver     PreemptLoader     requested pages have a channel of their own
    ReleasingSaver                     the source gives memory back as it arrives

Each is a LiveSaver or LiveLoader of corefw.section, and inherits from the one above it in its column. A saver may be a
ReleasingSaver besides any of the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corefw.section import LiveLoader, LiveSaver
from corefw.wire.stream import StreamReader, StreamWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from corefw.machine import FaultSource


class PostcopySaver(LiveSaver):
    """A section whose rest may follow once the guest runs on the destination.

    Then prepare_postcopy() is called while the guest still runs, and begin_postcopy() instead of complete() when it has
    stopped; iterate() goes on until it returns True, and complete() writes the END body, with nothing left to send.
    What the guest may wait for while it runs there is an OnDemandSaver's. A ChannelError from any of them pauses the
    migration, and prepare_resume() follows before iterate() goes on over another channel; but if there is no
    OnDemandSaver, the destination does not wait for that.
    """

    @abstractmethod
    def follows_later(self) -> bool:
        """Whether this migration may switch to postcopy, by its settings; known from setup() on
        (SaveVMHandlers.has_postcopy). Pending.can_postcopy counts what may follow."""

    def prepare_postcopy(self, writer: StreamWriter) -> None:
        """The guest will be stopped next: do now what would keep it stopped for longer, and write the commands that can
        go ahead. No section is open, and no PART follows. Not called if the switch was decided after the guest had
        stopped. This default does nothing."""

    @abstractmethod
    def begin_postcopy(self, writer: StreamWriter) -> None:
        """The guest has stopped: harvest for the last time, and write the commands that tell the destination what to
        forget. What can be done later, iterate() does. No section is open."""

    @abstractmethod
    def prepare_resume(self, received: Callable[[str, int], NDArray[np.bool_]]) -> None:
        """The connection broke: find out what the destination has, to send the rest. `received(block, pages)` asks the
        destination which of a RAM block's pages have arrived, and raises ChannelError."""


class OnDemandSaver(PostcopySaver):
    """A PostcopySaver whose rest the guest may wait for on the destination: RAM. With a budget of 0, iterate() writes
    what was requested and nothing else."""

    @abstractmethod
    def request_pages(self, block: str, start: int, length: int) -> None:
        """The destination's guest waits for these bytes of a RAM block that the section covers: let iterate() write
        them before anything else. Called in the return path's thread. Raises StreamError for anything but whole
        pages."""


class PreemptSaver(OnDemandSaver):
    """An OnDemandSaver that can also send requested pages over a channel of their own (capability postcopy-preempt).

    Where there is such a channel, send_requested() is called instead of request_pages(), in the return path's thread
    and while iterate() may be under way in the migration thread. Each page goes over one of the two channels, once.
    """

    @abstractmethod
    def send_requested(self, writer: StreamWriter, block: str, start: int, length: int) -> None:
        """Write those of these bytes of a RAM block that are still to be sent. Raises StreamError for anything but
        whole pages, ChannelError."""

    def serve_requests(self, reader: StreamReader, writer: StreamWriter, block: str) -> str:
        """Answer the requests that follow, if this can be done faster than with send_requested(). Called after that, in
        the same thread, with the return path and what send_requested() has written to.

        Read and answer REQ_PAGES and REQ_PAGES_ID for as long as the return path brings nothing else, and wait for it
        meanwhile; anything else is left in the reader, and so is a request that is wrong. `block` is the block of the
        request before, which one without a name is for; returns that of the last one. Raises ChannelError. This default
        leaves everything to the caller.

        What was sent is counted before this method waits again; once nothing is left to be sent, it writes nothing."""
        del reader, writer
        return block

    @abstractmethod
    def end_requested(self, writer: StreamWriter) -> None:
        """Everything was sent: write the end mark. Nothing is written to this channel afterwards."""


class ReleasingSaver(PostcopySaver):
    """A PostcopySaver that gives the guest's memory back to the host as it arrives (capability release-ram).

    The engine asks the destination from time to time whether it has what was sent: mark() is called when it asks,
    release() when the answer has come. After a broken connection what the destination has counts as written anew.
    prepare_resume() raises StreamError if that lacks anything that was released.
    """

    @abstractmethod
    def mark(self) -> None:
        """The destination is asked about everything that iterate() has written. One question is open at a time."""

    @abstractmethod
    def release(self) -> None:
        """The destination has it: give its memory back."""

    @abstractmethod
    def release_all(self) -> None:
        """The destination has everything."""


class PostcopyLoader(LiveLoader):
    """Reads what a PostcopySaver writes, the last of it while the guest runs."""

    @abstractmethod
    def listen(self, faults: FaultSource) -> None:
        """The guest is about to run: install what load() reads from now on, and never overwrite what is here."""

    @abstractmethod
    def connection_lost(self) -> None:
        """After listen(): the connection broke, or what came over it made no sense. load() may go on over another one
        with the next section, or nothing more comes. Called in the incoming thread; must not raise."""


@dataclass(frozen=True, slots=True)
class ServedFaults:
    """What is left to do when compiled code has served page faults.

    unsent   the rest of what was to be sent to the source, of which a part may have gone
    missed   pages for wait_for(), by block: ascending numbers
    error    what the socket reported, or the userfaultfd
    """

    unsent: bytes
    missed: Mapping[str, NDArray[np.int64]]
    error: OSError | None


class FaultServer(ABC):
    """Compiled code that serves page faults: it reads them, installs pages that have arrived, and requests the others.
    One thread at a time."""

    @abstractmethod
    def serve(self, descriptor: int | None, wake: int, seconds: float | None) -> ServedFaults:
        """Serve faults until something is left to do, the descriptor `wake` is readable, or `seconds` are over. May
        return earlier.

        descriptor   a connected stream socket: the return path. None: a page that has not arrived is in `missed`. A
                     page that it has been asked for is requested once; what the guest waits for already when another
                     socket takes its place is for the caller to request.
        """


class OnDemandLoader(PostcopyLoader):
    """Reads what an OnDemandSaver writes.

    Threads: `wait_for`, `outstanding` and the server's methods are called while load() may be under way in the incoming
    thread.
    """

    @abstractmethod
    def discard(self, block: str, start: int, length: int) -> None:
        """Before listen(): forget these bytes of a RAM block; they come again. Raises StreamError."""

    @abstractmethod
    def wait_for(self, block: str, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """The guest waits for these pages (ascending numbers): install those that have arrived. Returns the others, as
        runs (first, end), for them to be requested."""

    @abstractmethod
    def outstanding(self, block: str) -> NDArray[np.int64]:
        """The pages that the guest waits for and that have not arrived, as runs (first, end)."""

    def fault_server(self) -> FaultServer | None:
        """After listen(): compiled code that does what poll() and wait_for() do, for all blocks of the section. None if
        there is none, or if it cannot."""
        return None

    @abstractmethod
    def received(self, block: str) -> NDArray[np.bool_]:
        """For each page of the block, whether it has arrived. Raises StreamError if the section has no such block."""


class PreemptLoader(OnDemandLoader):
    """Reads what a PreemptSaver writes."""

    @abstractmethod
    def load_requested(self, reader: StreamReader) -> None:
        """After listen(): read the channel of requested pages up to its end mark, while load() may be under way in the
        incoming thread. Raises StreamError, ChannelError."""
