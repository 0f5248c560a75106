"""The channel of requested pages (capability postcopy-preempt), on either side.

Pages that the destination's guest waits for have a channel of their own, and so wait for none of those that are under
way in the stream. The source writes to it in the return path's thread, the destination reads it in a thread of its own.
Nothing frames the pages; one word ends them.

When the channel is opened differs. QEMU 7.2 opens it before it sends anything, and as a destination reads nothing
before it has both channels. QEMU from 8.0 on opens it right before the guest is handed over, unless the machine type is
older than that, and as a destination takes the first channel to be the stream. So a source opens it here when the
destination has accepted the migration, or earlier if it has not answered the first PING in ANSWER seconds, and so may
not read the stream yet; and a destination accepts it at any time. Between two migfws the channel begins with a proof
that both belong to this migration (identity.py). A source that has opened it earlier then opens another one.

Source: QEMU 7.2, postcopy_preempt_setup, migration_ioc_process_incoming; QEMU 10.0, postcopy_preempt_establish_channel,
ram_save_host_page_urgent, postcopy_preempt_thread, postcopy_ram_incoming_cleanup.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np

from corefw.channel import Channel, Transport
from corefw.engine.examination import MOST
from corefw.engine.identity import Purpose, prove_source
from corefw.engine.link import Link
from corefw.engine.standby import StandbyThread
from corefw.errors import ANYTHING, ChannelClosed, ChannelError, MigfwError, SettingsError
from corefw.postcopy import PostcopySaver, PreemptLoader, PreemptSaver
from corefw.settings import Settings
from corefw.wire.constants import BE64, TARGET_PAGE_SIZE, RamFlag
from corefw.wire.stream import StreamReader, StreamWriter

log = logging.getLogger(__name__)

CAPABILITY: Final = "postcopy-preempt"

WHERE: Final = "requested pages"

ANSWER: Final = 0.5
"""Seconds that a destination has to answer the first PING: long beside a round trip."""

FIRST_RECORDS: Final = frozenset({RamFlag.PAGE, RamFlag.ZERO, RamFlag.EOS})
"""What the channel may begin with: the first page names its block."""

TICK: Final = 0.02
"""Seconds between two looks at what is missing, when everything else has arrived."""


def check_channels(settings: Settings, transport: Transport) -> None:
    """Raise SettingsError if pages are to have a channel of their own, and the transport has only one."""
    if settings.capability(CAPABILITY) and not transport.features.multi_channel:
        raise SettingsError(
            f"'{transport.uri}': '{transport.uri.scheme}:' has only one channel (switch capability '{CAPABILITY}' off)"
        )


# -- the source --------------------------------------------------------------------------------------------------------


class RequestedSender:
    """The source's end. `send` and `serve` are called in the return path's thread, everything else in the migration
    thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._writer = StreamWriter(channel)
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise ChannelError if the channel was closed on its way to the destination, which sends nothing over it."""
        if self._channel.wait_readable(0):
            raise _closed_there(self._channel)

    def close(self) -> None:
        """Another channel takes its place before anything was sent. Does not raise."""
        self._channel.close()

    def send(self, saver: PreemptSaver, block: str, start: int, length: int) -> None:
        """Send pages that the destination's guest waits for. Raises StreamError, ChannelError."""
        with self._lock:
            saver.send_requested(self._writer, block, start, length)
            self._writer.flush()

    def serve(self, saver: PreemptSaver, reader: StreamReader, block: str) -> str:
        """Let the saver answer what follows a request for `block`: the block of the last request. Raises
        ChannelError."""
        return saver.serve_requests(reader, self._writer, block)

    def end(self, savers: Sequence[PostcopySaver]) -> None:
        """Everything was sent, so serve(), which may be waiting for requests, writes nothing any more. Raises
        ChannelError."""
        with self._lock:
            writer = StreamWriter(self._channel)  # the other one is that thread's
            for saver in savers:
                if isinstance(saver, PreemptSaver):
                    saver.end_requested(writer)
            writer.flush()


def open_requested(link: Link, secret: bytes | None) -> RequestedSender:
    """Open the channel, which shows the destination by the secret, if there is one, that it is its source's. Raises
    ChannelError."""
    channel = link.open_urgent_channel()
    if secret is not None:
        try:
            with link.awaiting():
                prove_source(channel, secret, Purpose.REQUESTED)
        except ChannelClosed as error:
            raise _closed_there(channel) from error
    return RequestedSender(channel)


def _closed_there(channel: Channel) -> ChannelError:
    return ChannelError(
        f"{channel.peer}: the destination closed the channel of requested pages (switch capability '{CAPABILITY}' on"
        " there too, or off here)"
    )


# -- the destination ---------------------------------------------------------------------------------------------------


class RequestedReceiver:
    """The destination's end, for one connection: the channel, once it has come, and the thread that reads it.

    A migfw's channel has shown that it is the source's before it comes here. A QEMU's cannot: it is the first over
    which something comes that may be a requested page, which is not before the guest has been handed over.

    Threads: any may call `take`, `offer` and `abort`, the incoming thread everything else.
    """

    def __init__(self, break_connection: Callable[[], None]) -> None:
        """`break_connection` is called, once, if what comes over the channel cannot be loaded."""
        self._break_connection = break_connection
        self._changed = threading.Condition()  # guards what follows
        self._candidates: list[Channel] = []
        self._channel: Channel | None = None
        self._reader: StreamReader | None = None
        self._loader: PreemptLoader | None = None
        self._closed = False
        self._error: MigfwError | None = None
        self._thread: StandbyThread | None = None

    def take(self, channel: Channel) -> None:
        """This channel is the source's; it is closed if that had come before."""
        if not self._choose(channel, StreamReader(channel, where=WHERE)):
            log.warning("closed a connection from %s: there is a channel of requested pages already", channel.peer)
            channel.close()

    def offer(self, channel: Channel) -> bool:
        """This channel may be the source's, which proves nothing. False if that has come already."""
        with self._changed:
            if self._closed or self._channel is not None:
                return False
            oldest = self._candidates.pop(0) if len(self._candidates) >= MOST else None
            self._candidates.append(channel)
        if oldest is not None:
            oldest.abort()
        threading.Thread(target=self._await_page, args=(channel,), name="requested pages?", daemon=True).start()
        return True

    def _choose(self, channel: Channel, reader: StreamReader) -> bool:
        """Read this one, if no other is read."""
        with self._changed:
            if self._closed or self._channel is not None:
                return False
            self._channel, self._reader = channel, reader
            others, self._candidates = self._candidates, []
            self._changed.notify_all()
        for other in others:
            if other is not channel:
                other.abort()
        return True

    def _await_page(self, channel: Channel) -> None:
        reader = StreamReader(channel, where=WHERE)
        try:
            genuine = _may_begin_pages(reader.peek(BE64.size))
        except MigfwError:
            genuine = False
        if genuine and self._loader is not None and self._choose(channel, reader):
            return
        channel.close()
        with self._changed:
            was_last = self._candidates == [channel]
            if channel in self._candidates:
                self._candidates.remove(channel)
            broke = was_last and self._loader is not None and not self._closed
        if broke:
            self._fail(ChannelError(f"{channel.peer}: the channel of requested pages was closed"))

    def start(self, loader: PreemptLoader, thread: StandbyThread) -> None:
        """From now on pages may be requested; `thread` reads them."""
        with self._changed:
            self._loader = loader
        self._thread = thread
        thread.begin(partial(self._run, loader))

    def check(self) -> None:
        """Raise what was wrong with the channel, if anything was."""
        if self._error is not None:
            raise self._error

    def await_rest(self, limit: Callable[[], float]) -> None:
        """The stream has ended: wait for the pages that are still under way over this channel, which may have no end
        mark. Gives up when none has come for `limit()` seconds (0: never), or when the channel has ended."""
        loader, since = self._loader, time.monotonic()
        assert loader is not None, "called before start()"
        missing = _missing(loader)
        while missing and self._thread is not None and self._thread.is_alive:
            self._thread.join(TICK)
            before, missing = missing, _missing(loader)
            if missing != before:
                since = time.monotonic()
            elif 0 < limit() <= time.monotonic() - since:
                return

    def abort(self) -> None:
        """End await_rest(), and take nothing more. From any thread; idempotent; does not raise."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            channels, self._candidates = self._candidates, []
            if self._channel is not None:
                channels.append(self._channel)
        for one in channels:
            one.abort()

    def close(self) -> None:
        """abort(), and end the thread. Idempotent; does not raise."""
        self.abort()
        if self._thread is not None:
            self._thread.join()
        if self._channel is not None:
            self._channel.close()

    def _run(self, loader: PreemptLoader) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._channel is not None)
            reader = self._reader
        if reader is None:
            return
        try:
            loader.load_requested(reader)
            return
        except MigfwError as error:
            self._fail(error)
        except ANYTHING as bug:
            log.exception("a requested page could not be loaded")
            self._fail(MigfwError(f"internal error: {type(bug).__name__}: {bug}"))

    def _fail(self, error: MigfwError) -> None:
        with self._changed:
            self._error = self._error or error
            closed = self._closed
        if not closed:
            self._break_connection()


def _may_begin_pages(head: bytes) -> bool:
    """Whether the channel of requested pages may begin with these bytes."""
    return len(head) == BE64.size and BE64.unpack(head)[0] % TARGET_PAGE_SIZE in FIRST_RECORDS and not head[0]


def _missing(loader: PreemptLoader) -> int:
    return sum(int(np.count_nonzero(~loader.received(block))) for block in loader.covers().ram_blocks)
