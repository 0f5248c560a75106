"""The hub of a listener: one socket, one link per peer.

Invariant: each peer has a stream of its own; ZeroMQ tags every message with its sender, so streams never mix. Messages
before HELLO are dropped. The socket lives until the last link is done; once the listener is closed, new peers are
refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

import zmq

from corefw_transport_zmq.hub import LOST, PING, Hub, PingTimer, Socket, pack, read
from corefw_transport_zmq.keys import Gatekeeper
from corefw_transport_zmq.link import Link
from corefw_transport_zmq.protocol import Kind, Message, ProtocolError, read_greeting

log = logging.getLogger(__name__)

BACKLOG: Final = 16
"""Peers waiting to be accepted; each may already have sent a window of data."""

PING_SECONDS: Final = 0.5
"""Seconds between PINGs: ZeroMQ only notices that a peer has gone when something is sent to it."""


class ServingHub(Hub):
    """The hub of a listener.

    arrived_fd   readable while a peer waits to be accepted, and after the hub has ended; only to be polled"""

    def __init__(self, socket: Socket, peer: str, gatekeeper: Gatekeeper | None) -> None:
        super().__init__(socket, "migfw-zmq-listen")
        socket.router_mandatory = True
        self.arrived_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._peer = peer
        self._links: dict[bytes, Link] = {}
        self._waiting: deque[Link] = deque()
        self._waiting_lock = threading.Lock()
        self._closed = False
        self._ping = PingTimer(PING_SECONDS)
        self._gatekeeper = gatekeeper
        if gatekeeper:
            self._poller.register(gatekeeper.socket, zmq.POLLIN)

    # -- the listener's --------------------------------------------------------------------------------------------

    def take(self) -> Link | None:
        """Take the next peer that waits to be accepted."""
        with self._waiting_lock, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.eventfd_read(self.arrived_fd)
                return self._waiting.popleft() if self._waiting else None
        return None

    def close(self) -> None:
        """Refuse new peers, and make arrived_fd readable; the thread ends with the last link."""
        with self._waiting_lock:
            if self._closed:
                return
            self._closed = True
            turned_away = list(self._waiting)
            self._waiting.clear()
            os.eventfd_write(self.arrived_fd, 1)
        for link in turned_away:
            link.abort()
            link.close()
        self.wake()

    # -- the thread's ----------------------------------------------------------------------------------------------

    def links(self) -> Sequence[tuple[list[bytes], Link]]:
        return [([identity], link) for identity, link in self._links.items()]

    def arrived(self, parts: list[zmq.Frame]) -> None:
        identity = parts[0].bytes
        message = read(parts[1:])
        if message is None:
            return
        if link := self._links.get(identity):
            link.handle(message)
        elif message.kind is Kind.HELLO:
            self._greet(identity, message, parts[1])

    def _greet(self, identity: bytes, message: Message, frame: zmq.Frame) -> None:
        try:
            window = read_greeting(message, Kind.HELLO)
        except ProtocolError as error:
            log.warning("zmq: refused a peer: %s", error)
            self.send([identity], Message(Kind.REFUSE, 0, str(error).encode()))
            return
        link = Link(f"{self._peer} from {_origin(frame)}", self.wake, pack)
        with self._waiting_lock:
            refusal = "it is no longer listening" if self._closed else None
            if len(self._waiting) >= BACKLOG:
                refusal = "too many wait to be accepted"
            if refusal is None:
                self._waiting.append(link)
                os.eventfd_write(self.arrived_fd, 1)
        if refusal:
            self.send([identity], Message(Kind.REFUSE, 0, refusal.encode()))
            return
        self._links[identity] = link
        link.open(window, answer=True)

    def look_around(self, ready: dict[object, int]) -> bool:
        if self._gatekeeper and self._gatekeeper.socket in ready:
            self._gatekeeper.answer()
        if self._ping.due():
            for route, link in self.links():
                if not self.send(route, PING):
                    self._hear_out(link)
        for identity in [identity for identity, link in self._links.items() if link.done]:
            del self._links[identity]
        return bool(self._links) or not self._closed

    def _hear_out(self, link: Link) -> None:
        """Receive the remaining messages of a lost peer, then notify its link."""
        while self.socket.poll(0):
            self.arrived(self.socket.recv_multipart(zmq.NOBLOCK, copy=False))
        link.lost(LOST)

    def ended(self) -> None:
        if self._gatekeeper:
            self._gatekeeper.socket.close()
        with self._waiting_lock:
            if not self._closed:  # it failed: wake accept()
                os.eventfd_write(self.arrived_fd, 1)


def _origin(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("Peer-Address")) or "this host"
    except zmq.ZMQError:
        return "this host"
