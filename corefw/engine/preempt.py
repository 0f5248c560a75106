"""The channel of requested pages (capability postcopy-preempt), on either side.

Pages that the destination's guest waits for have a channel of their own, and so wait for none of those that are under
way in the stream. The source writes to it in the return path's thread, the destination reads it in a thread of its own.
Nothing frames the pages; one word ends them.

When the channel is opened differs. QEMU 7.2 opens it before it sends anything, and as a destination reads nothing
before it has both channels. QEMU from 8.0 on opens it right before the guest is handed over, unless the machine type is
older than that, and as a destination takes the first channel to be the stream. So a source opens it here once the
destination has answered the first PING, which shows that it has the stream, or when ANSWER seconds have passed; and a
destination accepts it at any time.

Source: QEMU 7.2, postcopy_preempt_setup, migration_ioc_process_incoming; QEMU 10.0, postcopy_preempt_establish_channel,
ram_save_host_page_urgent, postcopy_preempt_thread, postcopy_ram_incoming_cleanup.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from corefw.channel import Channel, Transport
from corefw.engine.link import Link
from corefw.engine.scheduling import answer_at_once
from corefw.errors import ANYTHING, ChannelError, MigfwError, SettingsError
from corefw.postcopy import PostcopySaver, PreemptLoader, PreemptSaver
from corefw.settings import Settings
from corefw.wire.constants import ReturnMessage
from corefw.wire.stream import StreamReader, StreamWriter

log = logging.getLogger(__name__)

CAPABILITY: Final = "postcopy-preempt"

ANSWER: Final = 0.5
"""Seconds that a destination has to answer the first PING: long beside a round trip."""

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
    """The source's end. `send` is called in the return path's thread, everything else in the migration thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._writer = StreamWriter(channel)
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise ChannelError if the channel was closed on its way to the destination, which sends nothing over it."""
        if self._channel.wait_readable(0):
            raise ChannelError(
                f"{self._channel.peer}: the destination closed the channel of requested pages (switch capability"
                f" '{CAPABILITY}' on there too, or off here)"
            )

    def send(self, saver: PreemptSaver, block: str, start: int, length: int) -> None:
        """Send pages that the destination's guest waits for. Raises StreamError, ChannelError."""
        with self._lock:
            saver.send_requested(self._writer, block, start, length)
            self._writer.flush()

    def end(self, savers: Sequence[PostcopySaver]) -> None:
        """Everything was sent. Raises ChannelError."""
        with self._lock:
            for saver in savers:
                if isinstance(saver, PreemptSaver):
                    saver.end_requested(self._writer)
            self._writer.flush()


def open_requested(link: Link) -> RequestedSender:
    """Open the channel, after a PING 1 was sent. Raises ChannelError."""
    link.answers.wait(ReturnMessage.PONG, 1, ANSWER)
    return RequestedSender(link.open_urgent_channel())


# -- the destination ---------------------------------------------------------------------------------------------------


class RequestedReceiver:
    """The destination's end, for one connection: the channel, once it has come, and the thread that reads it.

    Threads: any may call `offer`, the incoming thread everything else.
    """

    def __init__(self, break_connection: Callable[[], None]) -> None:
        """`break_connection` is called, once, if what comes over the channel cannot be loaded."""
        self._break_connection = break_connection
        self._changed = threading.Condition()  # guards what follows
        self._channel: Channel | None = None
        self._loader: PreemptLoader | None = None
        self._closed = False
        self._error: MigfwError | None = None
        self._thread: threading.Thread | None = None

    def offer(self, channel: Channel) -> bool:
        """Take this channel, if the source's has not come yet."""
        with self._changed:
            self._dismiss_stranger()
            if self._closed or self._channel is not None:
                return False
            self._channel = channel
            self._changed.notify_all()
            return True

    def _dismiss_stranger(self) -> None:
        """The source's channel is silent until pages are requested: close one that is not, or that has ended."""
        channel = self._channel
        if channel is None or self._loader is not None:
            return
        try:
            strange = channel.wait_readable(0)
        except ChannelError:
            strange = True
        if strange:
            channel.close()
            self._channel = None

    def start(self, loader: PreemptLoader) -> None:
        """From now on pages may be requested."""
        with self._changed:
            self._dismiss_stranger()
            self._loader = loader
        self._thread = threading.Thread(target=self._run, args=(loader,), name="requested pages", daemon=True)
        self._thread.start()

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
        while missing and self._thread is not None and self._thread.is_alive():
            self._thread.join(TICK)
            before, missing = missing, _missing(loader)
            if missing != before:
                since = time.monotonic()
            elif 0 < limit() <= time.monotonic() - since:
                return

    def close(self) -> None:
        """End the thread. Idempotent; does not raise."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            channel = self._channel
        if self._thread is not None:
            if channel is not None and self._thread.is_alive():
                channel.abort()
            self._thread.join()

    def _run(self, loader: PreemptLoader) -> None:
        answer_at_once()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._channel is not None)
            channel = self._channel
        if channel is None:
            return
        try:
            loader.load_requested(StreamReader(channel, where="requested pages"))
            return
        except MigfwError as error:
            self._error = error
        except ANYTHING as bug:
            log.exception("a requested page could not be loaded")
            self._error = MigfwError(f"internal error: {type(bug).__name__}: {bug}")
        if not self._closed:
            self._break_connection()


def _missing(loader: PreemptLoader) -> int:
    return sum(int(np.count_nonzero(~loader.received(block))) for block in loader.covers().ram_blocks)
