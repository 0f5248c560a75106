"""The return path: messages from the destination to the source, in the other direction of the stream's channel.

The guest has arrived when SHUT 0 has come, after everything was sent. Anything else that ends the return path fails the
migration. Between two migfws the destination says why it failed (MIGFW_REASON) before it sends SHUT 1.

Source: QEMU 10.0, source_return_path_thread, await_return_path_close_on_source, migrate_send_rp_message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from corefw.channel import Channel, SendsToSocket
from corefw.engine.scheduling import answer_at_once
from corefw.errors import ANYTHING, ChannelClosed, ChannelError, MigfwError, PeerError, StreamError
from corefw.wire.constants import ALIVE_PING, ReturnMessage
from corefw.wire.records import write_received_bitmap
from corefw.wire.returnpath import (
    PageRequest,
    ReturnMessageRecord,
    encode_return_message,
    number_body,
    page_request_message,
    parse_number,
    parse_reason,
    read_return_message,
    reason_body,
    recv_bitmap_body,
)
from corefw.wire.stream import MemorySink, StreamReader, StreamWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_ACCEPTED: Final = (ReturnMessage.SHUT, 0)

LOOK: Final = 0.2
"""Seconds between two looks at a send that the source does not take."""

Handler = Callable[[ReturnMessageRecord, StreamReader], None]
"""Called in the return path's thread with a message, and with the reader to take from it what follows the message. What
it raises ends the return path."""


class ReturnPathReader:
    """The source's end: a thread that reads messages until SHUT 0, or until something is wrong.

    Each message is passed to its handler; one without a handler fails the migration. Messages that are waited for
    are announced with `expect`, so that a destination cannot make the source collect others.

    received    bytes that have come
    owes_sign   the destination has not answered the last PING that asks whether it lives (ALIVE_PING)

    `on_failure` is called from that thread, once, if the path ends in anything but SHUT 0.
    """

    def __init__(self, channel: Channel, on_failure: Callable[[], None]) -> None:
        self._channel = channel
        self._on_failure = on_failure
        self._handlers: Final[dict[int, Handler]] = {
            ReturnMessage.PONG: self._pong,
            ReturnMessage.SWITCHOVER_ACK: self._switchover_ack,
            ReturnMessage.RESUME_ACK: self._resume_ack,
            ReturnMessage.MIGFW_REASON: self._note_reason,
            ReturnMessage.SHUT: self._shut,
        }
        self._changed = threading.Condition()  # guards the four below
        self._ended = False
        self._expected = {(ReturnMessage.SWITCHOVER_ACK, 0)}
        self._received: set[tuple[ReturnMessage, int]] = set()
        self._error: MigfwError | None = None
        self._reason = ""
        self.owes_sign = False
        self._reader = StreamReader(channel, size=4096, where="return path")
        self._thread = threading.Thread(target=self._run, name="return path", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is not None:
            raise self._error

    @property
    def received(self) -> int:
        return self._reader.received

    @property
    def refused(self) -> bool:
        """Whether the destination itself reported that it failed: then it does not run the guest."""
        return isinstance(self._error, PeerError)

    @property
    def explained(self) -> bool:
        """Whether the destination, a migfw, gave a reason."""
        return bool(self._reason)

    @property
    def accepted(self) -> bool:
        """Whether the destination confirmed that it has the guest."""
        return _ACCEPTED in self._received

    def handle(self, message: int, handler: Handler) -> None:
        """From now on the destination may send this message too: a ReturnMessage, or one of PLUGIN_MESSAGES."""
        self._handlers[message] = handler

    def expect_sign(self) -> None:
        """A PING by which the destination has to show that it lives is about to be sent."""
        self.owes_sign = True

    def expect(self, message: ReturnMessage, value: int) -> None:
        """From now on the destination may send this; wait() then finds it. SHUT 0 before that is an error."""
        with self._changed:
            self._expected.add((message, value))

    def wait(self, message: ReturnMessage, value: int, seconds: float) -> bool:
        """Block until an expected message has come; False after `seconds`. Raises what ended the path instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or (message, value) in self._received, seconds)
            received = (message, value) in self._received
        if not received:
            self.check()
        return received

    def has(self, message: ReturnMessage, value: int) -> bool:
        """Whether an expected message has come."""
        return (message, value) in self._received

    def note(self, message: ReturnMessage, value: int) -> None:
        """For handlers: this has come. wait() finds it if it was expected."""
        with self._changed:
            if (message, value) in self._expected:
                self._received.add((message, value))
                self._changed.notify_all()

    def wait_end(self, seconds: float) -> bool:
        """Block until the path has ended, for `seconds` at most; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, seconds)

    def join(self) -> None:
        """After abort() of the channel, or SHUT."""
        if self._thread.ident is not None:
            self._thread.join()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        answer_at_once()
        error: MigfwError | None = None
        try:
            while not self.accepted:
                self._dispatch(self._reader)
        except MigfwError as caught:
            error = caught
        except ANYTHING as bug:
            log.exception("the return path failed")
            error = MigfwError(f"internal error on the return path: {type(bug).__name__}: {bug}")
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()
        if error is not None:
            self._on_failure()

    def _dispatch(self, reader: StreamReader) -> None:
        """Read one message and call its handler."""
        if reader.at_end():
            raise ChannelClosed(
                f"{self._channel.peer} closed the return path without reporting a result"
                " (its log says why; a QEMU's stderr)"
            )
        message = read_return_message(reader, self._handlers)
        handler = self._handlers.get(message.type)
        if handler is None:
            raise StreamError(f"return path: unexpected {ReturnMessage(message.type).name}")
        handler(message, reader)

    # -- the handlers ----------------------------------------------------------------------------------------------

    def _pong(self, message: ReturnMessageRecord, _: StreamReader) -> None:
        number = parse_number(message.body)
        if number == ALIVE_PING:
            self.owes_sign = False
        else:
            self.note(ReturnMessage.PONG, number)

    def _switchover_ack(self, _message: ReturnMessageRecord, _: StreamReader) -> None:
        self.note(ReturnMessage.SWITCHOVER_ACK, 0)

    def _resume_ack(self, message: ReturnMessageRecord, _: StreamReader) -> None:
        self.note(ReturnMessage.RESUME_ACK, parse_number(message.body))

    def _note_reason(self, message: ReturnMessageRecord, _: StreamReader) -> None:
        self._reason = parse_reason(message.body)

    def _shut(self, message: ReturnMessageRecord, _: StreamReader) -> None:
        if status := parse_number(message.body):
            why = f": {self._reason}" if self._reason else f" (status {status}; its log says why)"
            raise PeerError(f"the destination failed to load the guest{why}")
        if _ACCEPTED not in self._expected:
            raise StreamError("return path: the destination confirmed the guest before everything was sent")
        self.note(ReturnMessage.SHUT, 0)


class ReturnPathWriter:
    """The destination's end. Messages go out whole, from any thread. A source that does not take one within a limit has
    its channel aborted, from a thread that runs until close()."""

    def __init__(self, channel: Channel, limit: Callable[[], tuple[float, str]]) -> None:
        """`limit()`: the present limit in seconds, 0 for none, and the parameter that says so. Raises ChannelError if
        the process has no thread left."""
        self._channel = channel
        self._limit = limit
        self._turn = threading.Condition()  # guards the three below
        self._taken = False  # a thread sends, or has borrowed the socket
        self._wanting = 0  # threads that wait to send a message
        self._recall: Callable[[], None] | None = None
        self._began: float | None = None  # when the present send did
        self._expired = ""
        self._closed = False
        self._sends = threading.Event()  # set when there may be a send to watch
        try:
            threading.Thread(target=self._watch, name="return path limit", daemon=True).start()
        except RuntimeError as error:
            raise ChannelError(f"{channel.peer}: there can be no return path: {error}") from None

    def send(self, message: ReturnMessage | int, body: bytes = b"") -> None:
        """Raises ChannelError."""
        self._send(encode_return_message(message, body))

    def _send(self, *parts: bytes | bytearray) -> None:
        with self._turn:
            self._wanting += 1
            if self._recall is not None:
                self._recall()
            self._turn.wait_for(lambda: not self._taken)
            self._wanting -= 1
            self._taken = True
        try:
            self._send_now(*parts)
        finally:
            self._give_turn()

    def _give_turn(self) -> None:
        with self._turn:
            self._taken = False
            self._recall = None
            self._turn.notify_all()

    def _send_now(self, *parts: bytes | bytearray) -> None:
        self._began = time.monotonic()
        if not self._sends.is_set():
            self._sends.set()
        try:
            self._channel.send(*parts)
        except ChannelError:
            if self._expired:
                raise ChannelError(self._expired) from None
            raise
        finally:
            self._began = None

    @property
    def lends_socket(self) -> bool:
        """Whether lend_socket() may be called."""
        return isinstance(self._channel, SendsToSocket)

    def lend_socket(self, use: Callable[[int], bytes], recall: Callable[[], None]) -> None:
        """Call `use(descriptor)`, which may send whole messages over the socket for as long as it likes. It returns the
        rest of what it could not send without waiting, and raises OSError as sendmsg(2) does.

        When another thread has a message to send, `recall` is called there, possibly more than once: `use` has to
        return soon. Raises ChannelError.
        """
        assert isinstance(self._channel, SendsToSocket), "see lends_socket"
        unsent = b""

        def send(descriptor: int) -> int:
            nonlocal unsent
            unsent = use(descriptor)
            return 0

        with self._turn:
            self._turn.wait_for(lambda: not self._taken and not self._wanting)
            self._taken, self._recall = True, recall
        try:
            self._channel.send_to_socket(send)
            if unsent:
                self._send_now(unsent)
        finally:
            self._give_turn()

    def request_pages(self, request: PageRequest) -> None:
        """Ask for pages that the guest waits for. Raises ChannelError."""
        self._send(page_request_message(request))

    def received_pages(self, block: str, received: NDArray[np.bool_]) -> None:
        """Say which pages of a RAM block have arrived: the answer to RECV_BITMAP. Raises ChannelError."""
        sink = MemorySink()
        writer = StreamWriter(sink)
        write_received_bitmap(writer, received)
        writer.flush()
        self._send(encode_return_message(ReturnMessage.RECV_BITMAP, recv_bitmap_body(block)), sink.data)

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

    def _watch(self) -> None:
        """Sleep until a send begins; look again when that one may have taken too long."""
        while True:
            self._sends.wait()
            if self._closed:
                return
            self._sends.clear()
            while (began := self._began) is not None:
                limit, parameter = self._limit()
                rest = began + limit - time.monotonic()
                if limit and rest <= 0:
                    self._expired = (
                        f"{self._channel.peer}: the source took no message of the return path in {limit:g} s"
                        f" (parameter {parameter})"
                    )
                    self._channel.abort()
                    return
                time.sleep(min(rest, LOOK) if limit else LOOK)

    def close(self) -> None:
        """Nothing more will be sent."""
        self._closed = True
        self._sends.set()
