"""deflate:HOST:PORT: TCP with the stream compressed on the way, for a guest that crosses a slow link.

The law: each direction is one zlib stream, flushed after every send, so that nothing waits for more to come. It ends
with zlib's end mark; a connection that ends without that was cut. Nothing is inflated before it is asked for: a peer's
few bytes cannot become much memory here.
"""

from __future__ import annotations

import time
import zlib
from typing import Final

from corefw.channel import Buffer, Channel, Interrupt, Listener, Transport, TransportFeatures
from corefw.errors import ChannelError
from corefw.net.dialing import connect_tcp, listen_tcp
from corefw.uri import MigrationUri, split_host_port

__all__ = ["DeflateTransport"]

LEVEL: Final = 1
"""zlib's fastest: a migration that is late has to send the pages that were written in the meantime again."""

STEP: Final = 1 << 20
"""Bytes that are compressed at a time: what bounds the memory of one send."""

ROOM: Final = 1 << 16
"""Compressed bytes that are received at a time."""


class DeflateTransport(Transport):
    """deflate:HOST:PORT. A wrong URI raises UriError when it is made; nothing else happens then."""

    features = TransportFeatures(return_path=True, multi_channel=True)

    def __init__(self, uri: MigrationUri) -> None:
        super().__init__(uri)
        self._host, self._port = split_host_port(uri.rest, str(uri))

    def connect(self, interrupt: Interrupt) -> Channel:
        return DeflateChannel(connect_tcp(self._host, self._port, self.uri, interrupt))

    def listen(self) -> Listener:
        return DeflateListener(listen_tcp(self._host, self._port, self.uri))


class DeflateListener(Listener):
    """A TCP listener whose peers compress."""

    def __init__(self, inner: Listener) -> None:
        self._inner = inner
        self.uri = inner.uri

    def accept(self, interrupt: Interrupt) -> Channel:
        return DeflateChannel(self._inner.accept(interrupt))

    def close(self) -> None:
        self._inner.close()


class DeflateChannel(Channel):
    """Another channel, with both directions compressed. Owns it.

    The sending and the receiving half share nothing, for they may belong to two threads.
    """

    def __init__(self, inner: Channel) -> None:
        self.peer = inner.peer
        self.has_return_path = inner.has_return_path
        self._inner = inner
        self._deflate = zlib.compressobj(LEVEL)
        self._inflate = zlib.decompressobj()
        self._room = memoryview(bytearray(ROOM))
        self._compressed = b""  # received, and not inflated yet
        self._ready = b""  # inflated, and not asked for yet

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, *parts: Buffer) -> None:
        out, size = [], 0
        for part in parts:
            view = memoryview(part).cast("B")
            for at in range(0, len(view), STEP):
                piece = view[at : at + STEP]
                out.append(self._deflate.compress(piece))
                size += len(piece)
                if size >= STEP:
                    self._inner.send(*out)
                    out, size = [], 0
        # The flush pushes everything out that zlib still holds back: the receiver must not wait for it.
        self._inner.send(*out, self._deflate.flush(zlib.Z_SYNC_FLUSH))

    def send_eof(self) -> None:
        self._inner.send(self._deflate.flush(zlib.Z_FINISH))
        self._inner.send_eof()

    # -- receiving -------------------------------------------------------------------------------------------------

    def receive_into(self, view: memoryview) -> int:
        while not self._ready and not self._inflated(len(view)):
            if self._inflate.eof:
                return 0
            self._receive()
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def wait_readable(self, seconds: float) -> bool:
        """Compressed bytes that are there need not make a single byte of the stream, so this inflates them.

        A destination asks before each receive, so it inflates as many as a receive takes, not just one.
        """
        deadline = time.monotonic() + seconds
        while not self._ready and not self._inflated(ROOM) and not self._inflate.eof:
            if not self._inner.wait_readable(deadline - time.monotonic()):
                return False
            self._receive()
        return True

    def _inflated(self, limit: int) -> bool:
        """Inflate up to `limit` bytes of what was received; False when that is not enough for one."""
        try:
            self._ready = self._inflate.decompress(self._compressed, limit)
        except zlib.error as error:
            raise ChannelError(f"{self.peer}: what came is not compressed as it should be ({error})") from None
        self._compressed = self._inflate.unconsumed_tail
        return bool(self._ready)

    def _receive(self) -> None:
        count = self._inner.receive_into(self._room)
        if count == 0:
            raise ChannelError(f"{self.peer}: the connection ended in the middle of the stream")
        self._compressed += self._room[:count]

    # -- both ------------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()
