"""The source's connection to the destination: its channels, the stream's writer, and the return path.

What belongs to one connection is here and nowhere else, so a migration that resumes replaces its link as a whole. The
channels that savers open belong to the link they were opened over, and end with it.

Threads: the migration thread; `abort` and `open_channel` may be called from any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from corefw.channel import Channel, Interrupt, LimitsSilence, Transport
from corefw.engine.liveness import Liveness, interval_of, limit_of
from corefw.engine.meter import Meter, counted, metered
from corefw.engine.returnpath import Handler, ReturnPathReader
from corefw.errors import ChannelError
from corefw.net.channelset import ChannelSet
from corefw.settings import Settings
from corefw.wire.constants import ALIVE_PING, Command, ReturnMessage
from corefw.wire.records import ping_payload, write_command
from corefw.wire.stream import StreamWriter

LAST_WORDS: Final = 1.0
"""Seconds that the destination has for its last message, which may still be on its way, when the connection broke or
the migration was cancelled."""

LOOK: Final = 0.1
"""Seconds between two calls of the check that may end a wait for an answer."""


class Link:
    """One connection. `channel` and `writer` exist once connect() has returned; `abort` works at any time.

    return_path   None before read_return_path(), and in a migration without that capability
    paused        the user has broken it on purpose
    """

    channel: Channel
    writer: StreamWriter

    def __init__(self, transport: Transport, interrupt: Interrupt, meter: Meter, settings: Settings) -> None:
        self.transport: Final = transport
        self.return_path: ReturnPathReader | None = None
        self.paused = False
        self._interrupt = interrupt
        self._aborted = Interrupt()
        self._meter = meter
        self._settings = settings
        self._channels = ChannelSet()
        self._liveness: Liveness | None = None
        self._failure: ChannelError | None = None
        self._awaits = False  # an answer that a destination gives at once
        self._next_ping = 0.0

    def connect(self) -> None:
        """Dial, and begin a stream. Raises ChannelError, Interrupted."""
        self._interrupt.check()
        self._liveness = Liveness(self._settings, self._signs, self._owes_sign, self._give_up)
        with self.awaiting():
            self.channel = self._connect()
        self.writer = StreamWriter(self.channel)

    def open_channel(self) -> Channel:
        """One more channel to the destination, metered as the stream's own is. Raises ChannelError if the transport has
        only one."""
        if not self.transport.features.multi_channel:
            raise ChannelError(f"{self.transport.uri}: '{self.transport.uri.scheme}' has only one channel")
        return self._connect()

    def open_urgent_channel(self) -> Channel:
        """One more channel, which no limit of the bandwidth holds back. Raises ChannelError."""
        return self._channels.add(counted(self._dial(), self._meter))

    def _connect(self) -> Channel:
        return self._channels.add(metered(self._dial(), self._meter))

    def _dial(self) -> Channel:
        channel = self.transport.connect(self._aborted)
        if isinstance(channel, LimitsSilence) and (limit := limit_of(self._settings)):
            channel.limit_silence(limit)
        return channel

    # -- signs of life ---------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Send a PING if it is time for one: the destination sees that this side lives, and has to answer. Between two
        sections; does nothing without a return path."""
        now = time.monotonic()
        path = self.return_path
        if path is None or path.owes_sign or now < self._next_ping:
            return
        self._next_ping = now + interval_of(self._settings)
        path.expect_sign()
        write_command(self.writer, Command.PING, ping_payload(ALIVE_PING))
        self.writer.flush()

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """While this goes on, the destination has to give signs of life."""
        self._awaits = True
        try:
            yield
        finally:
            self._awaits = False

    def rest(self) -> None:
        """From now on the destination may be silent: the end of the stream is about to go out."""
        if self._liveness is not None:
            self._liveness.close()

    def _signs(self) -> object:
        path = self.return_path
        return self._meter.total, path.received if path is not None else 0

    def _owes_sign(self) -> bool:
        path = self.return_path
        return self._awaits or self._meter.longest_send() > 0 or (path is not None and path.owes_sign)

    def _give_up(self, reason: str) -> None:
        self._failure = ChannelError(f"{self.transport.uri}: {reason}")
        self.abort()

    # -- the return path -------------------------------------------------------------------------------------------

    def read_return_path(
        self, handlers: Mapping[int, Handler], on_failure: Callable[[], None], *, may_end: bool = False
    ) -> None:
        """Begin to read the return path, with these handlers beside its own. `on_failure` is called from its thread if
        it ends in anything but success. `may_end`: the first message may be SHUT 0."""
        self.return_path = ReturnPathReader(self.channel, on_failure)
        for message, handler in handlers.items():
            self.return_path.handle(message, handler)
        if may_end:
            self.return_path.expect(ReturnMessage.SHUT, 0)
        self.return_path.start()

    @property
    def answers(self) -> ReturnPathReader:
        """The return path, in a phase that cannot do without it."""
        assert self.return_path is not None, "this needs a return path"
        return self.return_path

    def ping(self, number: int, writer: StreamWriter | None = None) -> None:
        """Write a PING whose PONG can be awaited, to the stream or to a package that will be part of it."""
        if self.return_path is not None:
            self.return_path.expect(ReturnMessage.PONG, number)
        write_command(writer or self.writer, Command.PING, ping_payload(number))

    def check(self) -> None:
        """Raise what ended the connection, or the return path, if it failed."""
        if self._failure is not None:
            raise self._failure
        if self.return_path is not None:
            self.return_path.check()

    def await_answer(self, message: ReturnMessage, value: int, check: Callable[[float], None]) -> None:
        """Block until the destination has sent `message` with this value.

        `check` is called several times a second with the seconds waited so far, and ends the wait by raising. Raises
        what ended the return path too: PeerError, StreamError, ChannelError, Interrupted.
        """
        began = time.monotonic()
        while not self.answers.wait(message, value, LOOK):
            if self.answers.accepted:
                raise ChannelError(f"{self.channel.peer} has the whole guest already")
            check(time.monotonic() - began)

    def await_last_words(self) -> None:
        """The connection broke: give the destination a moment to say why."""
        if self.return_path is not None:
            self.return_path.wait_end(LAST_WORDS)

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Nothing more will be sent. Relays wait for this; a destination that has closed already does not mind."""
        with suppress(ChannelError):
            self.channel.send_eof()

    def part(self) -> None:
        """The destination has reported that it failed, and reads on until this stream ends. Make every call on the
        other channels raise Interrupted."""
        self._aborted.set()
        self._channels.abort_others(self.channel)
        self.finish()

    def pause(self) -> None:
        """Break it on purpose."""
        self.paused = True
        self.abort()

    def abort(self) -> None:
        """Make every call on one of its channels raise Interrupted, on those that are opened later too, and end a
        connect."""
        self._aborted.set()
        self._channels.abort()

    def close(self) -> None:
        """Join the return path's thread, which has to be ending (abort() or SHUT), and close all channels."""
        self.rest()
        if self.return_path is not None:
            self.return_path.join()
        self._channels.close()
