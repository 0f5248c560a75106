"""The destination's connection to its source: its channels, and the limits that the source is held to.

While the destination waits in the middle of something, ENOUGH bytes have to come within x-migfw-incoming-timeout. Once
the first live section has begun, the source may be silent for as long as it likes between two sections, as in
pre-switchover or while it waits for its bandwidth; that time does not count. The source has the same limit for taking a
message of the return path.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from corefw.channel import Channel, FileBacked, Interrupt, LimitsSilence, Listener, ReceivesFromSocket, ReceivesMemory
from corefw.engine.liveness import PARAMETER, limit_of
from corefw.engine.preempt import RequestedReceiver
from corefw.engine.returnpath import ReturnPathWriter
from corefw.errors import ANYTHING, ChannelError
from corefw.net.channelset import ChannelSet
from corefw.settings import Settings
from corefw.wire.stream import BULK_BUFFER_SIZE, StreamReader

log = logging.getLogger(__name__)

ENOUGH: Final = 1024
"""Bytes within x-migfw-incoming-timeout that count as progress: 17 bytes a second with the default."""

TICK: Final = 0.2
"""Seconds after which a wait for bytes checks for a cancel."""

DRAIN_SECONDS: Final = 2.0
DRAIN_BYTES: Final = 16 << 20
"""How long, and how much, is read from a source that goes on sending after it was told the result."""


class Connection:
    """One connection. A migration that resumes gets a new one.

    channel           the stream's
    reader            the stream
    source            where its bytes come from
    return_path       None before the source has asked for it
    requested         the channel of requested pages; None if they have none of their own
    from_migfw        the source is a migfw (MIGFW_PING): it reads more than QEMU's messages
    """

    def __init__(self, channel: Channel, settings: Settings, interrupt: Interrupt) -> None:
        if isinstance(channel, LimitsSilence) and (limit := limit_of(settings)):
            channel.limit_silence(limit)
        self.channel: Final = channel
        self.source: Final = _watched(channel, settings, interrupt)
        self._settings = settings
        self._interrupt = interrupt
        self._channels = ChannelSet()
        self._channels.add(channel)
        self.reader: Final = StreamReader(self.source, BULK_BUFFER_SIZE)
        self.return_path: ReturnPathWriter | None = None
        self.requested: RequestedReceiver | None = None
        self.from_migfw = False

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
        return ReturnPathWriter(self.channel, self._return_path_limit)

    def _return_path_limit(self) -> tuple[float, str]:
        patience = self._settings.integer("x-migfw-incoming-timeout") / 1000
        limits = ((patience, "x-migfw-incoming-timeout"), (limit_of(self._settings), PARAMETER))
        return min((limit for limit in limits if limit[0]), default=limits[0])

    def accept_channel(self, listener: Listener) -> Channel:
        """Wait for one more channel from the source. Raises ChannelError, Interrupted."""
        return self._channels.add(listener.accept(self._interrupt))

    def abort(self) -> None:
        """From any thread: make every call on one of the channels raise Interrupted."""
        self._channels.abort()
        self._abort_requested()

    def abort_others(self) -> None:
        """From any thread: the same for all but the stream's, over which the source can still be told the result."""
        self._channels.abort_others(self.channel)
        self._abort_requested()

    def _abort_requested(self) -> None:
        if self.requested is not None:
            self.requested.abort()

    def close(self) -> None:
        """Close all channels."""
        if self.requested is not None:
            self.requested.close()
        if self.return_path is not None:
            self.return_path.close()
        self._channels.close()

    # -- the result ------------------------------------------------------------------------------------------------

    def report_success(self) -> bool:
        """Tell the source that the guest is here; whether it is known to have heard."""
        return self.return_path is not None and self._report(self.return_path, 0)

    def report_failure(self, reason: str) -> bool:
        """Tell the source that the guest is not here, and why; whether it is known to have heard."""
        if self.return_path is None and self.channel.has_return_path:
            # It failed before OPEN_RETURN_PATH came. A source that opens the return path learns that it may keep its
            # guest; one that does not never reads this.
            try:
                self.return_path = self._writer()
            except ChannelError as error:
                log.warning("could not report the result to the source: %s", error)
        return self.return_path is not None and self._report(self.return_path, 1, reason if self.from_migfw else "")

    def _report(self, path: ReturnPathWriter, status: int, reason: str = "") -> bool:
        """Send the result, then read what the source still sends: closing a socket with unread bytes discards SHUT.
        True if it has ended its stream, as a source does that has read SHUT."""
        try:
            if reason:
                path.explain(reason)
            path.shut(status)
            self.channel.send_eof()
            return self._drain()
        except ChannelError as error:
            log.debug("the source went away: %s", error)
        except ANYTHING:  # a transport is a plugin: the migration is over, whatever it does
            log.exception("cannot report the result to the source")
        return False

    def _drain(self) -> bool:
        """Whether the source has ended its stream."""
        scratch = memoryview(bytearray(1 << 16))
        taken = 0
        deadline = time.monotonic() + DRAIN_SECONDS
        while taken < DRAIN_BYTES and self.channel.wait_readable(deadline - time.monotonic()):
            count = self.channel.receive_into(scratch)
            if not count:
                return True
            taken += count
        return False


class WatchedChannel:
    """A channel as the source of a stream. Its calls raise Interrupted soon after the migration was cancelled, and
    ChannelError if the source makes no progress where it has to."""

    def __init__(self, channel: Channel, settings: Settings, interrupt: Interrupt) -> None:
        self.channel: Final = channel
        self._settings = settings
        self._interrupt = interrupt
        self._next_check = 0.0
        self._may_pause = False
        self._owes_signs = False
        self._waited = 0.0
        self._silent = 0.0
        self._received = 0

    def expect_signs(self) -> None:
        """From now on the source gives signs of life, however little it has to send: it is a migfw, which sends PINGs,
        or the rest of a postcopy is under way."""
        self._owes_signs = True

    def allow_pause(self) -> None:
        """From now on the source may be silent."""
        self._may_pause = True
        self._restart()

    def forbid_pause(self) -> None:
        """From now on the source has to make progress."""
        self._may_pause = False

    def receive_into(self, view: memoryview, /) -> int:
        """As Channel.receive_into(). A single system call if bytes are there."""
        self._check_interrupt()
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

    def _check_interrupt(self) -> None:
        """Raise Interrupted if the migration was cancelled. Looks once in a TICK, since each look is a system call."""
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + TICK
            self._interrupt.check()

    def _wait_tick(self, seconds: float) -> bool:
        self._check_interrupt()
        began = time.monotonic()
        readable = self.channel.wait_readable(seconds)
        waited = time.monotonic() - began
        self._silent = 0.0 if readable else self._silent + waited
        self._check_signs()
        if not self._may_pause:
            self._waited += waited
            limit = self._settings.integer("x-migfw-incoming-timeout")
            if limit and self._waited * 1000 >= limit:
                raise ChannelError(
                    f"{self.channel.peer}: the source sent {self._received} bytes in {limit / 1000:g} s, expected at"
                    f" least {ENOUGH} (parameter x-migfw-incoming-timeout)"
                )
        return readable

    def _check_signs(self) -> None:
        limit = limit_of(self._settings)
        if self._owes_signs and 0 < limit <= self._silent:
            raise ChannelError(
                f"{self.channel.peer}: the source gave no sign of life in {limit:g} s (parameter {PARAMETER})"
            )

    def _count(self, count: int) -> int:
        self._received += count
        if self._received >= ENOUGH:
            self._restart()
        return count

    def _restart(self) -> None:
        self._waited = 0.0
        self._received = 0


class WatchedMemoryChannel(WatchedChannel, ReceivesMemory):
    """A channel that receives into scattered memory."""

    def receive_memory(self, pieces: Any) -> int:
        """See ReceivesMemory."""
        assert isinstance(self.channel, ReceivesMemory)
        while not self._wait_tick(TICK):
            pass
        return self._count(self.channel.receive_memory(pieces))


class WatchedSocketChannel(WatchedMemoryChannel, ReceivesFromSocket):
    """A channel that lends its socket."""

    def receive_from_socket(self, receive: Callable[[int], int]) -> int:
        """See ReceivesFromSocket."""
        assert isinstance(self.channel, ReceivesFromSocket)
        while not self._wait_tick(TICK):
            pass
        return self._count(self.channel.receive_from_socket(receive))


class WatchedFileChannel(WatchedChannel, FileBacked):
    """A channel that reads a file."""

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
        lends = isinstance(channel, ReceivesFromSocket)
        return (WatchedSocketChannel if lends else WatchedMemoryChannel)(channel, settings, interrupt)
    kind = WatchedFileChannel if isinstance(channel, FileBacked) else WatchedChannel
    return kind(channel, settings, interrupt)
