"""Tools of the contract kit for transports: two ends of a transport, and traffic between them.

A workbench closes everything that was made on it, whatever happens. Traffic is the same in every run.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Final, TypeVar

from corefw.channel import Buffer, Channel, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.errors import MigfwError, one_line
from corefw.testing.tasks import Task, described, settled, wait_until
from corefw.uri import MigrationUri

MIB: Final = 1 << 20

_C = TypeVar("_C", Channel, Listener)
_E = TypeVar("_E", bound=MigfwError)
_T = TypeVar("_T")

TransportFactory = Callable[[MigrationUri, TransportContext], Transport]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportCase:
    """A transport, and how to connect two ends of it.

    transport          (URI, context) -> Transport: usually the class
    listen             makes a new URI to listen at
    dial               the listener's `uri` -> the URI to dial, if they differ
    listen_transport   the transport of the listening end, if it is another one (behind a tunnel)
    context            the context of both; for a layer, or a transport with parameters, that of
                       `Plugins.load().transport_context()`
    wrong              URIs that the transport has to refuse with UriError
    refused            a URI at which there is no listener
    stuck              makes a context manager with a URI at which a dial does not end
    stored             the receiver reads only after the sender has ended (a file)
    features           the transport's features, if its class does not have them because they depend on the URI
    shows_breaks       the receiver can tell a broken connection from an end (with a pipe or a UNIX socket it cannot)
    stream_bytes       how many bytes the long checks send
    """

    transport: TransportFactory
    listen: Callable[[], str]
    dial: Callable[[MigrationUri], str] = str
    listen_transport: TransportFactory | None = None
    context: TransportContext = field(default_factory=TransportContext)
    wrong: Sequence[str] = ()
    refused: str | None = None
    stuck: Callable[[], AbstractContextManager[str]] | None = None
    stored: bool = False
    features: TransportFeatures | None = None
    shows_breaks: bool = True
    stream_bytes: int = 64 * MIB


@dataclass(slots=True)
class Workbench:
    """Makes ends for one check, and closes them."""

    case: TransportCase
    _mine: ExitStack = field(default_factory=ExitStack)

    def outgoing(self, uri: str) -> Transport:
        return self.case.transport(MigrationUri.parse(uri), self.case.context)

    def incoming(self, uri: str) -> Transport:
        factory = self.case.listen_transport or self.case.transport
        return factory(MigrationUri.parse(uri), self.case.context)

    def keep(self, what: _C) -> _C:
        self._mine.callback(what.close)
        if isinstance(what, Channel):
            self._mine.callback(what.abort)
        return what

    def interrupt(self) -> Interrupt:
        made = Interrupt()
        self._mine.callback(made.close)
        return made

    def listener(self, uri: str | None = None) -> Listener:
        return self.keep(self.incoming(uri or self.case.listen()).listen())

    def dial(self, listener: Listener) -> Transport:
        return self.outgoing(self.case.dial(listener.uri))

    def pair(self, listener: Listener | None = None) -> tuple[Channel, Channel]:
        """Connect two channels: (outgoing, incoming)."""
        listener = listener or self.listener()
        accepting = Task("accept", lambda: self.keep(listener.accept(self.interrupt())))
        connecting = Task("connect", lambda: self.keep(self.dial(listener).connect(self.interrupt())))
        out = connecting.result()
        return out, accepting.result()

    def stored(self, send: Callable[[Channel], object]) -> Channel:
        """Let `send` write to a channel, and end it; returns the channel that reads it."""
        uri = MigrationUri.parse(self.case.listen())
        out = self.keep(self.outgoing(self.case.dial(uri)).connect(self.interrupt()))
        send(out)
        out.send_eof()
        out.close()
        return self.keep(self.listener(str(uri)).accept(self.interrupt()))

    def ways(self) -> Iterator[tuple[str, Channel, Channel]]:
        """(name, sender, receiver) for each direction, on new channels."""
        out, into = self.pair()
        yield "to the destination", out, into
        if out.has_return_path:
            out, into = self.pair()
            yield "back to the source", into, out

    def close(self) -> None:
        self._mine.close()


# -- helpers -------------------------------------------------------------------------------------------------------


@cache
def pattern(count: int) -> bytes:
    """`count` bytes without repetition, the same each time."""
    return hashlib.shake_128(b"%d" % count).digest(count)


def dice(*faces: int) -> Iterator[int]:
    """An endless series of `faces` in an irregular order that is the same each time."""
    return (faces[byte % len(faces)] for byte in itertools.cycle(pattern(4099)))


def send_chunks(channel: Channel, data: bytes) -> None:
    """Send `data` in calls of many sizes, with one or several parts."""
    rest = memoryview(data)
    counts, sizes = dice(1, 1, 2, 5), dice(0, 1, 8, 4104, 65536, MIB)
    while rest:
        parts = []
        for size in itertools.islice(sizes, next(counts)):
            parts.append(rest[:size])
            rest = rest[size:]
        channel.send(*parts)


def receive_all(channel: Channel) -> bytearray:
    """Receive everything up to the end of the stream, into views of many sizes."""
    got, room = bytearray(), memoryview(bytearray(MIB))
    for size in dice(1, 7, 4096, MIB, MIB, MIB):
        count = channel.receive_into(room[:size])
        assert 0 <= count <= size, f"receive_into a view of {size} bytes returned {count}"
        if count == 0:
            break
        got += room[:count]
    return got


def transferred(sending: Task[None], receiving: Task[_T], seconds: float | None = None) -> _T:
    """Wait for both; return what was received. Raises the sender's error first: the receiver may be waiting for it."""

    def over() -> bool:
        return not receiving.running or (not sending.running and sending.error() is not None)

    wait_until(over, seconds)
    if not sending.running:
        sending.result()
    got = receiving.result(0.0)
    sending.result()
    return got


def flood_chunk(offset: int, size: int) -> bytes:
    """The bytes that a Flood sends at this offset of its stream."""
    return hashlib.shake_128(b"flood %d" % offset).digest(size)


class Flood:
    """A thread that sends chunks of `size` bytes, up to `limit` bytes, and then ends the stream. All chunks differ, so
    that a layer cannot compress them.

    sent   bytes that the channel has taken
    """

    def __init__(self, channel: Channel, what: str, size: int, limit: int) -> None:
        self.sent = 0
        self._channel = channel
        self._size = size
        self._limit = limit
        self.task = Task(what, self._send)

    def _send(self) -> None:
        while self.sent < self._limit:
            self._channel.send(flood_chunk(self.sent, self._size))
            self.sent += self._size
        self._channel.send_eof()

    def blocked(self, quiet: float = 0.25) -> int:
        """Wait until the channel takes no more; return how much was sent."""
        return settled(lambda: self.sent, quiet)


def same(got: Buffer, expected: Buffer) -> None:
    """Raise AssertionError with the offset of the first byte that differs."""
    if got == expected:
        return
    a, b = memoryview(got), memoryview(expected)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    raise AssertionError(f"sent {len(b)} bytes and received {len(a)}; they differ from byte {low} on")


def raises(kind: type[_E], what: str, function: Callable[..., object], *arguments: object) -> _E:
    """Call it in a thread and return its error, which must be of this kind and have a message of one line."""
    error = Task(what, function, *arguments).error()
    assert isinstance(error, kind), f"{what}: expected {kind.__name__}, got {described(error)}"
    text = str(error)
    assert text and "\n" not in text, f"{what}: expected a message of one line, got {text!r}"
    return error


def shows(error: MigfwError, uri: str) -> bool:
    """Whether the message contains the URI or, for a layer, the URI below it."""
    below = uri.partition("+")[2] if "+" in uri.partition(":")[0] else ""
    return one_line(uri) in str(error) or bool(below and one_line(below) in str(error))
