"""The return path: what the destination tells the source, on the way back of the same channel.

The law: until SHUT has come with 0, and not before everything was sent, nobody has said that the guest arrived.
Whatever else ends the return path fails the migration. Source: QEMU's source_return_path_thread,
await_return_path_close_on_source, migrate_send_rp_message.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from corefw.channel import Channel
from corefw.errors import FOREIGN, ChannelClosed, ChannelError, MigfwError, PeerError, StreamError
from corefw.wire.constants import ReturnMessage
from corefw.wire.returnpath import encode_return_message, number_body, parse_number, read_return_message
from corefw.wire.stream import StreamReader

log = logging.getLogger(__name__)


class ReturnPathReader:
    """The source's end: a thread that reads messages until SHUT, or until something is wrong.

    `on_failure` is called from that thread, once, when the path ended otherwise than with SHUT 0.
    """

    def __init__(self, channel: Channel, on_failure: Callable[[], None]) -> None:
        self._channel = channel
        self._on_failure = on_failure
        self._may_accept = False
        self._ended = threading.Event()
        self._acknowledged = threading.Event()
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

    def wait(self, seconds: float | None = None) -> None:
        """Block until the path has ended, at most for `seconds`. `Channel.abort()` ends the wait."""
        self._ended.wait(seconds)

    def wait_acknowledged(self, seconds: float) -> bool:
        """Wait at most that long for SWITCHOVER_ACK; whether it has come. Also returns when the path ends."""
        return self._acknowledged.wait(seconds) and not self._ended.is_set()

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
        except FOREIGN as bug:
            log.exception("the return path failed")
            self._error = MigfwError(f"internal error on the return path: {type(bug).__name__}: {bug}")
        finally:
            self._ended.set()
            self._acknowledged.set()
        if self._error is not None:
            self._on_failure()

    def _handle(self, reader: StreamReader) -> bool:
        """One message; True when it was SHUT 0."""
        if reader.at_end():
            raise ChannelClosed(f"{self._channel.peer} closed the return path without a word")
        message = read_return_message(reader)
        if message.type is ReturnMessage.PONG:
            log.debug("PONG %d", parse_number(message.body))
            return False
        if message.type is ReturnMessage.SWITCHOVER_ACK:
            self._acknowledged.set()
            return False
        if message.type is not ReturnMessage.SHUT:
            raise StreamError(f"return path: unexpected {message.type.name} (postcopy is not in use)")
        if status := parse_number(message.body):
            raise PeerError(f"the destination failed to load the guest (status {status}; its log says why)")
        if not self._may_accept:
            raise StreamError("return path: the destination said that it has the guest before everything was sent")
        return True


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

    def shut(self, status: int) -> None:
        """Say that it is over, 0 for success. A source that went away meanwhile is no error of ours."""
        try:
            self.send(ReturnMessage.SHUT, number_body(status))
        except ChannelError as error:
            log.warning("could not tell the source how it ended: %s", error)
