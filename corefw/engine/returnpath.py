"""The return path: what the destination tells the source, on the way back of the same channel.

The guest has arrived when SHUT came with 0, and came after everything was sent. Anything else that ends the return path
fails the migration. Between two migfws the destination says why it failed (MIGFW_REASON) before it says SHUT 1.

Source: QEMU's source_return_path_thread,
await_return_path_close_on_source, migrate_send_rp_message.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from corefw.channel import Channel
from corefw.errors import ANYTHING, ChannelClosed, ChannelError, MigfwError, PeerError, StreamError
from corefw.wire.constants import READY_PING, ReturnMessage
from corefw.wire.returnpath import (
    encode_return_message,
    number_body,
    parse_number,
    parse_reason,
    read_return_message,
    reason_body,
)
from corefw.wire.stream import StreamReader

log = logging.getLogger(__name__)

AWAITED: Final = frozenset({READY_PING})
"""The PINGs whose PONG somebody waits for."""


class ReturnPathReader:
    """The source's end: a thread that reads messages until SHUT, or until something is wrong.

    `on_failure` is called from that thread, once, when the path ended otherwise than with SHUT 0.
    """

    def __init__(self, channel: Channel, on_failure: Callable[[], None]) -> None:
        self._channel = channel
        self._on_failure = on_failure
        self._may_accept = False
        self._changed = threading.Condition()  # guards the four below
        self._ended = False
        self._pongs: set[int] = set()
        self._acknowledged = False
        self._reason = ""
        self._accepted = False
        self._error: MigfwError | None = None
        self._thread = threading.Thread(target=self._run, name="return path", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is not None:
            raise self._error

    @property
    def refused(self) -> bool:
        """Whether the destination itself said that it failed: then it does not run the guest."""
        return isinstance(self._error, PeerError)

    @property
    def accepted(self) -> bool:
        """Whether the destination said that it has the guest."""
        return self._accepted

    def expect_end(self) -> None:
        """From now on the destination may have everything, and say SHUT 0."""
        self._may_accept = True

    def wait(self, seconds: float | None = None) -> bool:
        """Block until the path has ended, at most for `seconds`; whether it has. `Channel.abort()` ends the wait."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, seconds)

    def wait_pong(self, value: int, seconds: float) -> bool:
        """Block until the destination has answered this PING or the path has ended; False after `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended or value in self._pongs, seconds)

    def wait_acknowledged(self, seconds: float) -> bool:
        """Wait at most that long for SWITCHOVER_ACK; whether it has come. Also returns when the path ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._acknowledged, seconds)
            return self._acknowledged and not self._ended

    def join(self) -> None:
        """After abort() of the channel, or SHUT."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            reader = StreamReader(self._channel, size=4096, where="return path")
            while not self._handle(reader):
                pass
            self._accepted = True
        except MigfwError as error:
            self._error = error
        except ANYTHING as bug:
            log.exception("the return path failed")
            self._error = MigfwError(f"internal error on the return path: {type(bug).__name__}: {bug}")
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
        if self._error is not None:
            self._on_failure()

    def _handle(self, reader: StreamReader) -> bool:
        """One message; True when it was SHUT 0."""
        if reader.at_end():
            raise ChannelClosed(
                f"{self._channel.peer} closed the return path without reporting a result"
                " (if it is a QEMU, its stderr or log says why)"
            )
        message = read_return_message(reader)
        if message.type is ReturnMessage.PONG:
            self._note_pong(parse_number(message.body))
            return False
        if message.type is ReturnMessage.MIGFW_REASON:
            self._reason = parse_reason(message.body)
            return False
        if message.type is ReturnMessage.SWITCHOVER_ACK:
            with self._changed:
                self._acknowledged = True
                self._changed.notify_all()
            return False
        if message.type is not ReturnMessage.SHUT:
            raise StreamError(f"return path: unexpected {message.type.name} (postcopy is not in use)")
        if status := parse_number(message.body):
            why = f": {self._reason}" if self._reason else f" (status {status}; its log says why)"
            raise PeerError(f"the destination failed to load the guest{why}")
        if not self._may_accept:
            raise StreamError("return path: the destination confirmed the guest before everything was sent")
        return True

    def _note_pong(self, value: int) -> None:
        with self._changed:
            if value in AWAITED:  # a destination may send as many others as it likes
                self._pongs.add(value)
                self._changed.notify_all()


class ReturnPathWriter:
    """The destination's end. Messages go out whole, from any thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def send(self, message: ReturnMessage, body: bytes = b"") -> None:
        """Raises ChannelError."""
        with self._lock:
            self._channel.send(encode_return_message(message, body))

    def pong(self, value: int) -> None:
        self.send(ReturnMessage.PONG, number_body(value))

    def explain(self, reason: str) -> None:
        """Say why SHUT will not be 0, to a source that is a migfw. Raises ChannelError."""
        self.send(ReturnMessage.MIGFW_REASON, reason_body(reason))

    def shut(self, status: int) -> None:
        """Say that it is over, 0 for success. A source that went away meanwhile is no error of ours."""
        try:
            self.send(ReturnMessage.SHUT, number_body(status))
        except ChannelError as error:
            log.warning("could not report the result to the source: %s", error)
