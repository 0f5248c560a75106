"""The thread that owns a ZeroMQ socket and moves messages between it and the links.

Invariant: only this thread uses the socket (ZeroMQ sockets are not thread-safe). It never blocks for long, and when it
ends, for whatever reason, every link is notified. ZeroMQ's send queues are unlimited, because links keep within the
peer's window; incoming messages are limited in size and number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import zmq

from corefw_transport_zmq.link import Link, Payload
from corefw_transport_zmq.protocol import CHUNK, Kind, Message, ProtocolError, read_message, write_header

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.25
"""Seconds between checks for lost peers and finished links when nothing else happens."""

TURN: Final = 32
"""Messages received in a row before the hub checks for something to send."""

RECEIVE_QUEUE: Final = 32
"""Messages from one peer that ZeroMQ queues before it stops reading from that peer."""

FLUSH_MILLISECONDS: Final = 1000
"""Time for the last messages (SEEN, BYE) to be sent when the socket is closed."""

HEARTBEAT_MILLISECONDS: Final = 10_000
SILENCE_MILLISECONDS: Final = 60_000
"""A peer that sends nothing for this long, not even heartbeats, is lost."""

HANDSHAKE_MILLISECONDS: Final = 10_000

_ENVELOPE: Final = 256  # overhead of CURVE per message

LOST: Final = "the connection to the peer was lost"

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


def pack(data: memoryview) -> Payload:
    """Copy into memory that ZeroMQ owns, which is then sent without another copy or a garbage collection thread."""
    return zmq.Frame(data, copy=True).buffer


def make_socket(kind: int) -> Socket:
    """Make a socket in a context of its own, so that closing it affects no other socket and can wait for last
    messages."""
    socket: Socket = zmq.Context().socket(kind)
    socket.linger = FLUSH_MILLISECONDS
    socket.sndhwm = 0
    socket.rcvhwm = RECEIVE_QUEUE
    socket.maxmsgsize = CHUNK + _ENVELOPE
    socket.ipv6 = True
    socket.heartbeat_ivl = HEARTBEAT_MILLISECONDS
    socket.heartbeat_timeout = SILENCE_MILLISECONDS
    socket.handshake_ivl = HANDSHAKE_MILLISECONDS
    return socket


class Hub(ABC):
    """Owns `socket` and its context."""

    def __init__(self, socket: Socket, name: str) -> None:
        self.socket = socket
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._poller.register(socket, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that there is something to do; from any thread."""
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the thread."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- what a kind of hub adds -----------------------------------------------------------------------------------

    @abstractmethod
    def links(self) -> Sequence[tuple[list[bytes], Link]]:
        """Yield each link with the first parts of the messages to it."""

    @abstractmethod
    def arrived(self, parts: list[zmq.Frame]) -> None:
        """Handle an incoming message."""

    @abstractmethod
    def look_around(self, ready: dict[object, int]) -> bool:
        """Check other sockets, peers and finished links after each turn. Returns False once the hub can end."""

    @abstractmethod
    def ended(self) -> None:
        """Close everything else when the thread ends."""

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # a bug, or libzmq out of resources: the links must be notified
            log.debug("zmq hub failed", exc_info=True)
            self._lose_all(f"ZeroMQ failed: {error}")
        finally:
            self._lose_all(LOST)
            self.ended()
            self._close_wake_fd()
            context = self.socket.context
            self.socket.close()
            context.term()

    def discard(self) -> None:
        """Release everything; called instead of start()."""
        self._close_wake_fd()
        self.socket.context.destroy(0)

    def _close_wake_fd(self) -> None:
        with self._lock:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _turn(self) -> bool:
        ready = dict(self._poller.poll(int(TICK_SECONDS * 1000)))
        if self._wake_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        if self.socket in ready:
            for _ in range(TURN):
                try:
                    parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                self.arrived(parts)
        for route, link in self.links():
            for message in link.outgoing():
                if not self.send(route, message):
                    link.lost(LOST)
                    break
        return self.look_around(ready)

    def send(self, route: Sequence[bytes], message: Message) -> bool:
        """Send a message. Returns False if the peer is gone."""
        payload = message.payload
        # A view made by `pack` refers to its frame.
        body = payload.obj if isinstance(payload, memoryview) else payload
        try:
            for part in route:
                self.socket.send(part, zmq.SNDMORE | zmq.NOBLOCK)
            if len(payload) == 0:
                self.socket.send(write_header(message), zmq.NOBLOCK)
            else:
                self.socket.send(write_header(message), zmq.SNDMORE | zmq.NOBLOCK)
                self.socket.send(body, zmq.NOBLOCK, copy=not isinstance(body, zmq.Frame))
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def _lose_all(self, why: str) -> None:
        for _, link in self.links():
            link.lost(why)


def read(parts: Sequence[zmq.Frame]) -> Message | None:
    """Parse a message; a malformed one is logged, and None is returned."""
    try:
        return read_message([part.buffer for part in parts])
    except ProtocolError as error:
        log.warning("zmq: %s was dropped", error)
        return None


class PingTimer:
    """Tells when to check whether the peers are still there."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._seconds
        return True


PING: Final = Message(Kind.PING)
