"""A Channel on top of a link."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Final

from corefw.channel import Buffer, Channel
from corefw_transport_zmq.hub import TICK_SECONDS, Hub
from corefw_transport_zmq.link import LINGER_SECONDS, Link
from corefw_transport_zmq.protocol import CHUNK

CLOSE_SECONDS: Final = 2.0
"""Seconds that close() waits for the peer to receive everything; after that a thread waits."""

SMALL: Final = 16 << 10
"""Parts of fewer bytes are joined with their neighbors: a message costs as much as copying this many bytes."""


class ZmqChannel(Channel):
    """close() waits for `hub`, which a dialed channel owns; None for an accepted channel, whose listener has the
    hub."""

    def __init__(self, link: Link, hub: Hub | None = None) -> None:
        self.peer = link.peer
        self.has_return_path = True
        self._link = link
        self._hub = hub
        self._closed = False

    def send(self, *parts: Buffer) -> None:
        for piece in _pieces(parts):
            self._link.send(piece)

    def receive_into(self, view: memoryview) -> int:
        assert len(view), "receive_into an empty view"
        return self._link.receive(view)

    def wait_readable(self, seconds: float) -> bool:
        return self._link.wait_readable(seconds)

    def send_eof(self) -> None:
        self._link.end()

    def abort(self) -> None:
        self._link.abort()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._link.close()
        # Not a daemon thread: the program may end right after close(), and sent data must still arrive.
        thread = threading.Thread(target=self._finish, name="migfw-zmq-close")
        thread.start()
        thread.join(CLOSE_SECONDS)

    def _finish(self) -> None:
        if self._hub:
            self._hub.wait(LINGER_SECONDS + 2 * TICK_SECONDS)
        else:
            self._link.wait_done(LINGER_SECONDS)


def _pieces(parts: Sequence[Buffer]) -> Iterator[memoryview]:
    """Split into messages: large parts unchanged, small ones joined."""
    small = bytearray()
    for part in parts:
        view = memoryview(part).cast("B")
        if len(view) >= SMALL:
            if small:
                yield memoryview(bytes(small))
                small.clear()
            yield view
            continue
        small += view
        if len(small) > CHUNK - SMALL:
            yield memoryview(bytes(small))
            small.clear()
    if small:
        yield memoryview(bytes(small))
