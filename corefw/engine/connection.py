"""The destination's connection to its source, and the limits that the source is held to.

While the destination waits in the middle of something, ENOUGH bytes have to come within x-migfw-incoming-timeout. Time
in which the source may well have nothing to say does not count: between two sections of a guest that has begun to come
it may be silent for as long as it likes, as in pre-switchover, or while it waits for its bandwidth. The source has as
long to take a message of the return path.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from corefw.channel import Channel, FileBacked, Interrupt, ReceivesMemory
from corefw.engine.returnpath import ReturnPathWriter
from corefw.errors import ANYTHING, ChannelError
from corefw.settings import Settings
from corefw.wire.stream import BULK_BUFFER_SIZE, StreamReader

log = logging.getLogger(__name__)

ENOUGH: Final = 1024
"""Bytes within x-migfw-incoming-timeout that are progress: with its default the slowest link has 17 bytes a second."""

TICK: Final = 0.2
"""Seconds between two looks for a cancel in a wait for bytes."""

DRAIN_SECONDS: Final = 2.0
DRAIN_BYTES: Final = 16 << 20
"""What is read, at most, of a source that goes on sending after it was told how the migration ended."""


class Connection:
    """One connection. A migration that resumes gets a new one.

    reader            the stream
    source            where its bytes come from
    return_path       None before the source has asked for it
    explains          the source is a migfw, and reads why a migration failed (MIGFW_PING)
    """

    def __init__(self, channel: Channel, settings: Settings, interrupt: Interrupt) -> None:
        self.channel: Final = channel
        self.source: Final = _watched(channel, settings, interrupt)
        self._settings = settings
        self.reader: Final = StreamReader(self.source, BULK_BUFFER_SIZE)
        self.return_path: ReturnPathWriter | None = None
        self.explains = False

    def open_return_path(self) -> ReturnPathWriter:
        """The source asked for it. Raises ChannelError where bytes flow one way only."""
        if not self.channel.has_return_path:
            raise ChannelError(
                f"the source wants a return path, but {self.channel.peer} is one-way"
                " (switch its capability 'return-path' off)"
            )
        self.return_path = self._writer()
        return self.return_path

    def _writer(self) -> ReturnPathWriter:
        return ReturnPathWriter(self.channel, lambda: self._settings.integer("x-migfw-incoming-timeout") / 1000)

    def abort(self) -> None:
        """From any thread: make every call on the channel raise Interrupted."""
        self.channel.abort()

    def close(self) -> None:
        if self.return_path is not None:
            self.return_path.close()
        self.channel.close()

    # -- the result ------------------------------------------------------------------------------------------------

    def report_success(self) -> None:
        """Tell the source that the guest is here."""
        if self.return_path is not None:
            self._report(self.return_path, 0)

    def report_failure(self, reason: str) -> None:
        """Tell the source that the guest is not here, and why."""
        if self.return_path is None and self.channel.has_return_path:
            # It failed before OPEN_RETURN_PATH came. A source that will open it learns that its guest may run on; one
            # that will not never reads this.
            self.return_path = self._writer()
        if self.return_path is not None:
            self._report(self.return_path, 1, reason if self.explains else "")

    def _report(self, path: ReturnPathWriter, status: int, reason: str = "") -> None:
        """Then take in what it still sends, for a socket closed on unread bytes would take SHUT with it."""
        try:
            if reason:
                path.explain(reason)
            path.shut(status)
            self.channel.send_eof()
            self._drain()
        except ChannelError as error:
            log.debug("the source went away: %s", error)
        except ANYTHING:  # a transport is a plugin: the migration is over, whatever it does
            log.exception("cannot report the result to the source")

    def _drain(self) -> None:
        scratch = memoryview(bytearray(1 << 16))
        taken = 0
        deadline = time.monotonic() + DRAIN_SECONDS
        while taken < DRAIN_BYTES and self.channel.wait_readable(deadline - time.monotonic()):
            count = self.channel.receive_into(scratch)
            if not count:
                return
            taken += count


class WatchedChannel:
    """A channel as a source of bytes. Every wait in it ends with Interrupted when the migration is cancelled, and with
    ChannelError when the source makes no progress where it has to."""

    def __init__(self, channel: Channel, settings: Settings, interrupt: Interrupt) -> None:
        self.channel: Final = channel
        self._settings = settings
        self._interrupt = interrupt
        self._next_look = 0.0
        self._may_pause = False
        self._waited = 0.0
        self._received = 0

    def allow_pause(self) -> None:
        """The source may be silent from here on."""
        self._may_pause = True
        self._restart()

    def forbid_pause(self) -> None:
        """The source has begun with something, and has to go on."""
        self._may_pause = False

    def receive_into(self, view: memoryview, /) -> int:
        """As Channel.receive_into(); one system call where bytes are there."""
        self._look_now_and_then()
        while (count := self.channel.try_receive_into(view)) is None:
            self._wait_tick(TICK)
        return self._count(count)

    def wait_readable(self, seconds: float) -> bool:
        """As Channel.wait_readable()."""
        deadline = time.monotonic() + seconds
        while True:
            rest = deadline - time.monotonic()
            if self._wait_tick(max(0.0, min(TICK, rest))):
                return True
            if rest <= TICK:
                return False

    def _look_now_and_then(self) -> None:
        """Raise Interrupted, within a TICK, also while bytes keep coming."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + TICK
            self._interrupt.check()

    def _wait_tick(self, seconds: float) -> bool:
        self._interrupt.check()
        began = time.monotonic()
        readable = self.channel.wait_readable(seconds)
        if not self._may_pause:
            self._waited += time.monotonic() - began
            limit = self._settings.integer("x-migfw-incoming-timeout")
            if limit and self._waited * 1000 >= limit:
                raise ChannelError(
                    f"{self.channel.peer}: the source sent {self._received} bytes in {limit / 1000:g} s, expected at"
                    f" least {ENOUGH} (parameter x-migfw-incoming-timeout)"
                )
        return readable

    def _count(self, count: int) -> int:
        self._received += count
        if self._received >= ENOUGH:
            self._restart()
        return count

    def _restart(self) -> None:
        self._waited = 0.0
        self._received = 0


class WatchedMemoryChannel(WatchedChannel, ReceivesMemory):
    """One whose channel receives into scattered memory."""

    def receive_memory(self, pieces: Any) -> int:
        """See ReceivesMemory."""
        assert isinstance(self.channel, ReceivesMemory)
        self._look_now_and_then()
        while not self._wait_tick(TICK):
            pass
        return self._count(self.channel.receive_memory(pieces))


class WatchedFileChannel(WatchedChannel, FileBacked):
    """One whose channel reads a file."""

    def __init__(self, channel: Channel, settings: Settings, interrupt: Interrupt) -> None:
        assert isinstance(channel, FileBacked)
        super().__init__(channel, settings, interrupt)
        self._file: Final[FileBacked] = channel
        self.origin = channel.origin

    def skip(self, count: int) -> None:
        """See FileBacked."""
        self._file.skip(count)


def _watched(channel: Channel, settings: Settings, interrupt: Interrupt) -> WatchedChannel:
    if isinstance(channel, ReceivesMemory):
        return WatchedMemoryChannel(channel, settings, interrupt)
    kind = WatchedFileChannel if isinstance(channel, FileBacked) else WatchedChannel
    return kind(channel, settings, interrupt)
