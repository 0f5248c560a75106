"""The destination's connection: which one brings a migration, and how long it may make no progress.

A connection that does not begin with the stream's magic number (a port scanner, a browser) does not count: the
destination says so in one line and waits for the next. One that does is held to x-migfw-incoming-timeout: while the
destination waits in the middle of something, ENOUGH bytes have to come in that time. Time in which the source may well
have nothing to say does not count. It pauses as long as it likes between two sections of a guest that has begun to
come, as in pre-switchover, or when the guest's downtime is long.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from corefw.channel import Channel, FileBacked, Interrupt, Listener, ReceivesMemory
from corefw.engine.checking import MAGIC as CHECK_MAGIC
from corefw.engine.checking import PATIENCE as CHECK_SECONDS
from corefw.errors import FOREIGN, ChannelError, Interrupted, MigfwError
from corefw.settings import Settings
from corefw.wire.constants import BE32, FILE_MAGIC
from corefw.wire.stream import BULK_BUFFER_SIZE, StreamReader

log = logging.getLogger(__name__)

MAGIC: Final = BE32.pack(FILE_MAGIC)
ENOUGH: Final = 1024
"""Bytes within x-migfw-incoming-timeout that are progress: with its default the slowest link has 17 bytes a second."""

TICK: Final = 0.2
"""Seconds after which a wait for bytes looks for a cancel."""


class Incoming:
    """A connection as a source of bytes. Every wait in it ends with Interrupted when the migration is cancelled, and
    with ChannelError when the source makes no progress where it has to."""

    def __init__(self, channel: Channel, settings: Settings, interrupt: Interrupt) -> None:
        self.channel: Final = channel
        self._settings = settings
        self._interrupt = interrupt
        self._may_pause = False
        self._waited = 0.0
        self._received = 0
        self._end: float | None = None

    def end_within(self, seconds: float) -> None:
        """From now on the source has this long for all that it says."""
        self._end = time.monotonic() + seconds

    def may_pause(self, allowed: bool) -> None:
        """Whether the source may be silent from here on; if not, it has begun with something and has to go on."""
        self._may_pause = allowed
        if allowed:
            self._restart()

    def receive_into(self, view: memoryview, /) -> int:
        self._wait()
        return self._count(self.channel.receive_into(view))

    def wait_readable(self, seconds: float) -> bool:
        """As Channel.wait_readable()."""
        deadline = time.monotonic() + seconds
        while True:
            rest = deadline - time.monotonic()
            if self._wait_tick(max(0.0, min(TICK, rest))):
                return True
            if rest <= TICK:
                return False

    def _wait(self) -> None:
        while not self._wait_tick(TICK):
            pass

    def _wait_tick(self, seconds: float) -> bool:
        self._interrupt.check()
        began = time.monotonic()
        if self._end is not None and began >= self._end:
            raise ChannelError(f"{self.channel.peer}: it takes too long")
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


class IncomingMemory(Incoming):
    """One whose channel receives into scattered memory."""

    def receive_memory(self, pieces: Any) -> int:
        """See ReceivesMemory."""
        assert isinstance(self.channel, ReceivesMemory)
        self._wait()
        return self._count(self.channel.receive_memory(pieces))


class IncomingFile(Incoming, FileBacked):
    """One whose channel reads a file."""

    def __init__(self, channel: Channel, settings: Settings, interrupt: Interrupt) -> None:
        assert isinstance(channel, FileBacked)
        super().__init__(channel, settings, interrupt)
        self._file: Final[FileBacked] = channel
        self.origin = channel.origin

    def skip(self, count: int) -> None:
        """See FileBacked."""
        self._file.skip(count)


def await_source(
    listener: Listener,
    settings: Settings,
    interrupt: Interrupt,
    hold: Callable[[Channel | None], None],
    answer: Callable[[StreamReader, Channel], None],
    *,
    again: bool,
) -> tuple[Incoming, StreamReader]:
    """Wait for a connection that brings a migration. Raises Interrupted, ChannelError.

    `answer` is called for a connection that brings a check instead (checking.py), behind its magic number. `hold` is
    given each connection at once, and None when it is closed again. Where the listener has only one to give
    (`again` is False), that one counts whatever it brings, and its first byte may take as long as it likes.
    """
    while True:
        channel = listener.accept(interrupt)
        hold(channel)
        source = _kind(channel)(channel, settings, interrupt)
        reader = StreamReader(source, BULK_BUFFER_SIZE)
        if not again:
            source.may_pause(True)
            reader.peek(1)
            source.may_pause(False)
            return source, reader
        problem = _problem(source, reader, answer)
        if problem is None:
            return source, reader
        if problem:
            log.warning("%s (ignored; the destination keeps waiting)", problem)
        hold(None)
        channel.close()


def _kind(channel: Channel) -> type[Incoming]:
    if isinstance(channel, ReceivesMemory):
        return IncomingMemory
    return IncomingFile if isinstance(channel, FileBacked) else Incoming


def _problem(source: Incoming, reader: StreamReader, answer: Callable[[StreamReader, Channel], None]) -> str | None:
    """Why these first bytes begin no migration; "" where they began a check, which has been answered."""
    peer = source.channel.peer
    try:
        head = reader.peek(len(MAGIC))
    except Interrupted:
        raise
    except ChannelError as error:
        return f"a connection carried no migration: {error}"
    if head == MAGIC:
        return None
    if head == CHECK_MAGIC:
        reader.read(len(CHECK_MAGIC), "the magic number")
        try:
            source.end_within(CHECK_SECONDS)
            answer(reader, source.channel)
        except Interrupted:
            raise
        except MigfwError as error:
            log.info("%s: a check was aborted: %s", peer, error)
        except FOREIGN:  # a machine is a plugin: whatever it does with what came, the destination waits on
            log.exception("%s: a check failed", peer)
        return ""
    if len(head) < len(MAGIC):
        return f"a connection ({peer}) ended after {len(head)} bytes"
    return f"a connection ({peer}) began with the bytes {head.hex(' ')}, expected a migration stream ('QEVM')"
