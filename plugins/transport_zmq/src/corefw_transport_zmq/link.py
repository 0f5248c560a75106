"""State of one stream, shared by the threads that use it and the hub that moves its messages.

Invariant: both sides count bytes and have to agree; nothing is queued beyond the peer's window; any end of the link
wakes all waiting threads.

Threads: users call `send`, `receive`, `abort` and so on, as in Channel; the hub calls `handle`, `outgoing`, `lost` and
`done`. A link does not depend on ZeroMQ: `pack` copies bytes into whatever the hub sends best.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from corefw.errors import ChannelError, Interrupted
from corefw_transport_zmq.protocol import CHUNK, CREDIT_STEP, WINDOW, Kind, Message, ProtocolError, greeting, text

LINGER_SECONDS: Final = 60.0
"""Seconds that a closed link waits for the peer to receive everything."""

Payload = bytes | memoryview
PEER_CLOSED: Final = "the peer closed the connection"


class Link:
    """State of one stream.

    peer    name of the other end, for messages
    wake    called when there is something for the hub to send
    """

    def __init__(self, peer: str, wake: Callable[[], None], pack: Callable[[memoryview], Payload] = bytes) -> None:
        self.peer = peer
        self._wake = wake
        self._pack = pack
        self._changed = threading.Condition()
        self._outbox: deque[Message] = deque()
        self._failure: str | None = None
        self._aborted = False
        self._closed_at: float | None = None
        # outgoing direction
        self._peer_window = 0
        self._sent = 0
        self._acknowledged = 0
        self._ended = False
        self._seen = False
        self._peer_left = False
        # incoming direction
        self._inbox: deque[memoryview] = deque()
        self._received = 0
        self._consumed = 0
        self._credited = 0
        self._peer_ended = False

    # -- users: sending --------------------------------------------------------------------------------------------

    def send(self, data: memoryview) -> None:
        """Queue all parts, blocking while the window is full. Raises ChannelError."""
        while data:
            count = min(len(data), CHUNK)
            with self._changed:
                self._check_sendable()
                while self._peer_window - (self._sent - self._acknowledged) < count:
                    self._changed.wait()
                    self._check_sendable()
                offset = self._sent
                self._sent += count
            piece = data[:count]
            message = Message(Kind.DATA, offset, self._pack(piece))  # copies, so done without the lock
            piece.release()
            with self._changed:
                self._queue(message)
            data = data[count:]

    def end(self) -> None:
        """End our direction. If the peer has already sent BYE and consumed everything, nothing more is sent."""
        with self._changed:
            if self._peer_left and self._acknowledged == self._sent and not self._aborted:
                self._ended = True
                return
            self._check_sendable()
            self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._queue(Message(Kind.END, self._sent))

    def _queue(self, message: Message) -> None:
        self._outbox.append(message)
        self._wake()

    # -- users: receiving ------------------------------------------------------------------------------------------

    def receive(self, view: memoryview) -> int:
        with self._changed:
            while not self._readable():
                self._changed.wait()
            if not self._inbox:
                return 0
            head = self._inbox[0]
        count = min(len(view), len(head))
        view[:count] = head[:count]
        with self._changed:
            if not self._inbox:  # emptied by abort() in the meantime
                self._readable()
                return 0
            if count == len(head):
                self._inbox.popleft()
            else:
                self._inbox[0] = head[count:]
            self._consumed += count
            if self._consumed - self._credited >= CREDIT_STEP and not self._peer_ended:
                self._credited = self._consumed
                self._queue(Message(Kind.CREDIT, self._consumed))
        return count

    def wait_readable(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(self._readable, max(0.0, seconds))

    def _readable(self) -> bool:
        """Whether bytes or the end are available. Raises what receive() would."""
        self._check_open()
        if self._inbox or self._peer_ended:
            return True
        if self._failure:
            raise ChannelError(f"{self.peer}: {self._failure}")
        return False

    def _check_open(self) -> None:
        if self._aborted or self._closed_at is not None:
            raise Interrupted(f"{self.peer}: " + ("cancelled" if self._aborted else "closed by this side"))

    def _check_sendable(self) -> None:
        self._check_open()
        if self._failure:
            raise ChannelError(f"{self.peer}: {self._failure}")
        if self._peer_left:
            raise ChannelError(f"{self.peer}: {PEER_CLOSED}")
        assert not self._ended, "send after send_eof"

    # -- users: ending ---------------------------------------------------------------------------------------------

    def abort(self) -> None:
        with self._changed:
            if self._aborted or self._closed_at is not None:
                return
            self._aborted = True
            self._break_off("the peer aborted")

    def close(self) -> None:
        """Close the link. The hub still delivers what is queued; `wait_done` waits for that."""
        with self._changed:
            if self._closed_at is not None:
                return
            self._closed_at = time.monotonic()
            self._inbox.clear()
            if not (self._aborted or self._failure):
                self._end()
                self._queue(Message(Kind.BYE, self._consumed))
            self._changed.notify_all()
            self._wake()

    def _break_off(self, why: str) -> None:
        """Drop queued data, send RESET, wake all waiting threads."""
        self._outbox.clear()
        self._inbox.clear()
        self._queue(Message(Kind.RESET, 0, why.encode()))
        self._changed.notify_all()

    # -- the hub's -------------------------------------------------------------------------------------------------

    def open(self, window: int, answer: bool) -> None:
        """Note that the peer's greeting arrived. `answer` queues ours, as a listener does."""
        with self._changed:
            self._peer_window = window
            if answer:
                self._queue(greeting(Kind.WELCOME))
            self._changed.notify_all()

    def outgoing(self) -> list[Message]:
        """Take everything that can be sent now."""
        with self._changed:
            messages = list(self._outbox)
            self._outbox.clear()
            if messages and self._closed_at is not None:
                self._changed.notify_all()  # wakes wait_done
            return messages

    def handle(self, message: Message) -> None:
        """Handle a message from the peer. A violation of the protocol breaks the link on both sides."""
        with self._changed:
            if self._aborted or self._failure:
                return
            try:
                _HANDLERS[message.kind](self, message)
            except ProtocolError as error:
                self._failure = f"the peer broke the protocol: {error}"
                self._break_off(f"protocol error: {error}")
            self._changed.notify_all()

    def lost(self, why: str) -> None:
        """Note that the connection is lost. An end that has already arrived stays an end."""
        with self._changed:
            self._failure = self._failure or (PEER_CLOSED if self._peer_left else why)
            self._outbox.clear()
            self._changed.notify_all()

    @property
    def done(self) -> bool:
        """Whether the hub can drop the link: it is closed, and everything has arrived or can no longer arrive."""
        with self._changed:
            return self._done()

    def wait_done(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(self._done, seconds)

    def _done(self) -> bool:
        if self._closed_at is None or self._outbox:
            return False
        arrived = self._seen or self._peer_left or self._aborted or self._failure is not None
        return arrived or time.monotonic() > self._closed_at + LINGER_SECONDS

    # -- what the peer says ----------------------------------------------------------------------------------------

    def _data(self, message: Message) -> None:
        count = len(message.payload)
        if self._peer_ended:
            raise ProtocolError("DATA after END")
        if message.argument != self._received:
            raise ProtocolError(f"DATA at offset {message.argument}, expected {self._received}")
        if self._received + count - self._consumed > WINDOW:
            raise ProtocolError("DATA beyond the window")
        self._received += count
        if self._closed_at is None:
            self._inbox.append(memoryview(message.payload))

    def _credit(self, message: Message) -> None:
        if not self._acknowledged <= message.argument <= self._sent:
            raise ProtocolError(f"{message.kind.name} for {message.argument} bytes of {self._sent}")
        self._acknowledged = message.argument

    def _end_of_peer(self, message: Message) -> None:
        if self._peer_ended or message.argument != self._received:
            raise ProtocolError(f"END after {message.argument} bytes, expected {self._received}")
        self._peer_ended = True
        self._queue(Message(Kind.SEEN, self._received))

    def _seen_by_peer(self, message: Message) -> None:
        if not self._ended or message.argument != self._sent:
            raise ProtocolError(f"SEEN of {message.argument} bytes, {self._sent} were sent")
        self._seen = True

    def _bye(self, message: Message) -> None:
        self._credit(message)
        self._peer_left = True
        self._outbox = deque(one for one in self._outbox if one.kind is not Kind.DATA)

    def _reset(self, message: Message) -> None:
        self._failure = f"connection reset by the peer: {text(message)}"
        self._outbox.clear()

    def _ping(self, _: Message) -> None:
        pass

    def _out_of_place(self, message: Message) -> None:
        raise ProtocolError(f"{message.kind.name} in the middle of a stream")


_HANDLERS: Final[dict[Kind, Callable[[Link, Message], None]]] = {
    Kind.HELLO: Link._out_of_place,
    Kind.WELCOME: Link._out_of_place,
    Kind.REFUSE: Link._out_of_place,
    Kind.DATA: Link._data,
    Kind.CREDIT: Link._credit,
    Kind.END: Link._end_of_peer,
    Kind.SEEN: Link._seen_by_peer,
    Kind.BYE: Link._bye,
    Kind.RESET: Link._reset,
    Kind.PING: Link._ping,
}
