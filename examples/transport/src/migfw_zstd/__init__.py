"""zstd+URI: any other transport with the stream compressed on the way, for a guest that crosses a slow link.

`zstd+tcp:HOST:PORT` is tcp:HOST:PORT, compressed in both directions; `zstd+file:PATH` writes a file that `zstd -d`
unpacks. The parameter x-zstd-level says how hard to try.

Each direction is a zstd stream that is flushed after every send, so that no bytes are held back. It ends with an empty
skippable frame, which every zstd decoder ignores: a connection that ends without one was cut. A receiver decompresses
no more than it was asked for, so a peer cannot fill its memory with a few bytes.
"""

from __future__ import annotations

import time
from typing import Final

import zstandard

from corefw.channel import Buffer, Channel, Interrupt, Listener, Transport, TransportContext
from corefw.declarations import Declarations, Kind, Parameter
from corefw.errors import ChannelError
from corefw.hookspecs import hookimpl
from corefw.uri import MigrationUri

__all__ = ["ZstdTransport", "corefw_settings"]

LEVEL: Final = Parameter(
    "x-zstd-level", Kind.INTEGER, 1, "zstd+URI: 1 is fastest, 19 compresses best", minimum=1, maximum=19
)

STEP: Final = 1 << 20
"""Bytes to compress at a time. Bounds the memory that a send needs."""

ROOM: Final = 1 << 16
"""Compressed bytes to receive at a time, and plain bytes to decompress when asked whether there are any."""

LATE_READS: Final = 8
"""Receives after the time that wait_readable() was given: enough for the largest block of zstd, 128 KiB, so that a
block that is there is found even by a caller that does not wait. A peer that sends frames without content gets no more.
"""

WINDOW: Final = 8 << 20
"""The largest window, in bytes, that a peer may ask for; level 19 needs that much."""

END: Final = bytes.fromhex("502a4d18 00000000")
"""A skippable frame without content (RFC 8878, 3.1.2). It marks a clean end of the stream."""


@hookimpl
def corefw_settings() -> Declarations:
    return Declarations(parameters=(LEVEL,), implements=frozenset({LEVEL.name}))


class ZstdTransport(Transport):
    """A layer over the transport of the URI after `zstd+`, with the same features."""

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        super().__init__(uri, context)
        self._inner = context.transport(uri.below_layer())
        self.features = self._inner.features

    def check_outgoing(self) -> None:
        self._inner.check_outgoing()

    def check_incoming(self) -> None:
        self._inner.check_incoming()

    def connect(self, interrupt: Interrupt) -> Channel:
        channel = ZstdChannel(self._inner.connect(interrupt), self._level())
        self.features = self._inner.features  # file: knows only now whether it is atomic
        return channel

    def listen(self) -> Listener:
        return ZstdListener(self._inner.listen(), self._level())

    def _level(self) -> int:
        return self.context.settings.integer(LEVEL.name)


class ZstdListener(Listener):
    """Accepts channels of another listener, and compresses them."""

    def __init__(self, inner: Listener, level: int) -> None:
        self.uri = inner.uri.with_layer("zstd")
        self._inner = inner
        self._level = level

    def accept(self, interrupt: Interrupt) -> Channel:
        return ZstdChannel(self._inner.accept(interrupt), self._level)

    def close(self) -> None:
        self._inner.close()


class ZstdChannel(Channel):
    """Another channel, with both directions compressed. Owns it.

    The sending and the receiving half share no state, because two threads may use them.
    """

    def __init__(self, inner: Channel, level: int) -> None:
        self.peer = inner.peer
        self.has_return_path = inner.has_return_path
        self._inner = inner
        self._compressor = zstandard.ZstdCompressor(level=level).compressobj()
        self._source = _Compressed(inner)
        self._reader = zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(
            self._source,  # type: ignore[arg-type]  # it calls read() and nothing else
            read_size=ROOM,
            read_across_frames=True,
        )
        self._ready = memoryview(b"")
        self._ended = False
        self._eof_sent = False
        self._failure: str | None = None

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, *parts: Buffer) -> None:
        out: list[bytes] = []
        size = 0
        for part in parts:
            view = memoryview(part).cast("B")
            for at in range(0, len(view), STEP):
                piece = view[at : at + STEP]
                out.append(self._compressor.compress(piece))
                size += len(piece)
                if size >= STEP:
                    self._inner.send(*out)
                    out, size = [], 0
        # Push out what zstd still holds back: the receiver must not wait for it.
        self._inner.send(*out, self._compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))

    def send_eof(self) -> None:
        if not self._eof_sent:
            self._eof_sent = True
            self._inner.send(self._compressor.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH), END)
        self._inner.send_eof()

    # -- receiving -------------------------------------------------------------------------------------------------

    def receive_into(self, view: memoryview) -> int:
        if self._ready:
            count = min(len(view), len(self._ready))
            view[:count] = self._ready[:count]
            self._ready = self._ready[count:]
            return count
        self._source.wait_forever()
        return self._decompress(view)

    def wait_readable(self, seconds: float) -> bool:
        """Decompress a little: compressed bytes that have arrived need not hold a single byte of the stream.

        It takes as much as a receive does, not a single byte, because a destination asks before each receive.
        """
        if not self._ready and not self._ended:
            self._source.wait_for(seconds)
            room = memoryview(bytearray(ROOM))
            try:
                self._ready = room[: self._decompress(room)]
            except TimeoutError:
                return False
        return True

    def _decompress(self, view: memoryview) -> int:
        """Decompress between 1 and len(view) bytes; 0 at the end. Raises ChannelError, TimeoutError."""
        if self._failure:
            raise ChannelError(self._failure)
        if self._ended:
            return 0
        try:
            count = self._reader.readinto1(view)
        except zstandard.ZstdError as error:
            self._failure = f"{self.peer}: the stream is not valid zstd ({error})"
            raise ChannelError(self._failure) from None
        self._ended = count == 0
        return count

    # -- both ------------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()
        self._ready, self._ended = memoryview(b""), False  # a later receive asks the inner channel, which is closed


class _Compressed:
    """What the decompressor reads from: the inner channel, until the end mark."""

    def __init__(self, inner: Channel) -> None:
        self._inner = inner
        self._room = memoryview(bytearray(ROOM))
        self._last = b""
        self._deadline: float | None = None
        self._late_reads = 0

    def wait_forever(self) -> None:
        """From now on read() waits for as long as it takes."""
        self._deadline = None

    def wait_for(self, seconds: float) -> None:
        """From now on read() raises TimeoutError when this time is over."""
        self._deadline = time.monotonic() + seconds
        self._late_reads = LATE_READS

    def read(self, size: int) -> memoryview:
        """Read up to `size` bytes; none at the end. Raises ChannelError, TimeoutError."""
        if self._deadline is not None:
            self._check_time(self._deadline - time.monotonic())
        got = self._room[: self._inner.receive_into(self._room[:size])]
        if not got and self._last != END:
            raise ChannelError(f"{self._inner.peer}: the connection ended in the middle of the stream")
        self._last = (self._last + got[-len(END) :])[-len(END) :]
        return got

    def _check_time(self, left: float) -> None:
        if left <= 0:
            self._late_reads -= 1
        if self._late_reads < 0 or not self._inner.wait_readable(max(left, 0)):
            raise TimeoutError
