"""The thread that owns a ZeroMQ socket, and moves messages between it and the links.

The law: only this thread touches the socket (ZeroMQ's are not thread-safe); it never blocks for long, and when it ends,
for whatever reason, every link learns of it. Queues in ZeroMQ have no limit of their own towards the peer, for links
keep within the peer's window; what comes from the peer is limited by size and number.
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
"""How often a hub looks for peers that have gone and links that are done, when nothing else happens."""

TURN: Final = 32
"""Messages received in one go before it is looked whether there is something to send."""

RECEIVE_QUEUE: Final = 32
"""Messages from one peer that ZeroMQ keeps for us; beyond that it stops reading from that peer."""

FLUSH_MILLISECONDS: Final = 1000
"""How long the last messages (an acknowledgement, a goodbye) have to get out when the socket is closed."""

HEARTBEAT_MILLISECONDS: Final = 10_000
SILENCE_MILLISECONDS: Final = 60_000
"""A peer that is silent for that long, heartbeats included, is gone."""

HANDSHAKE_MILLISECONDS: Final = 10_000

_ENVELOPE: Final = 256  # what CURVE puts around a message

LOST: Final = "the connection to the peer was lost"

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


def pack(data: memoryview) -> Payload:
    """Copy into memory of ZeroMQ's own: sending that copies no more, and needs no thread to collect it."""
    return zmq.Frame(data, copy=True).buffer


def make_socket(kind: int) -> Socket:
    """A socket in a context of its own, so that ending it disturbs nobody and can wait for the last messages."""
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
        """From any thread: there is something to do."""
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def wait(self, seconds: float) -> bool:
        """Wait for the thread's end."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- what a kind of hub adds -----------------------------------------------------------------------------------

    @abstractmethod
    def links(self) -> Sequence[tuple[list[bytes], Link]]:
        """(first parts of each message to it, link)."""

    @abstractmethod
    def arrived(self, parts: list[zmq.Frame]) -> None:
        """A message has come."""

    @abstractmethod
    def look_around(self, ready: dict[object, int]) -> bool:
        """After each turn: other sockets, peers, links that are done. False when there is nothing left to live for."""

    @abstractmethod
    def ended(self) -> None:
        """The thread ends: close what else there is."""

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # a bug, or libzmq out of resources: the links must hear of it
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
        """Let go of everything, instead of start()."""
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
        """False when the peer is not there any more."""
        payload = message.payload
        # A view that `pack` made leads back to its frame.
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
    """The message in these parts; None, logged, for one that is not ours."""
    try:
        return read_message([part.buffer for part in parts])
    except ProtocolError as error:
        log.warning("zmq: %s was dropped", error)
        return None


class PingTimer:
    """Tells when it is time to look whether the peers are still there."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._seconds
        return True


PING: Final = Message(Kind.PING)
