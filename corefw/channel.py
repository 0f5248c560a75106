"""Byte streams between two hosts, and how a URI becomes one.

Invariant: a channel moves bytes whole and in order, or raises; it knows nothing of what they mean. Whoever holds a
channel may call `abort()` from any thread at any time, and every call that is blocked in it then raises `Interrupted`
soon.

    Transport   one URI; makes channels by connecting or through a Listener
    Listener    waits for peers; `uri` is what a peer has to dial, with the port it really got
    Channel     one stream; bytes may flow back on it where `has_return_path`
    Interrupt   ends a wait in connect() and accept() from another thread

Threads: one thread at a time sends and one receives (they may be two different threads); `abort` is free of that.
After any ChannelError a channel is good for `close()` only, with one exception: when a send has failed, what the peer
had said before is still received.
"""

from __future__ import annotations

import os
import select
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from corefw.closing import Closing
from corefw.errors import ChannelClosed, ChannelError, Interrupted, UriError
from corefw.settings import Settings
from corefw.uri import MigrationUri

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview
"""What may be sent: contiguous bytes. NumPy arrays go through `array.data.cast("B")`."""


@dataclass(frozen=True, slots=True)
class TransportFeatures:
    """What a transport can do, known before anything is sent.

    return_path     bytes flow back from the destination, so "completed" can mean that the destination said so
    multi_channel   more than one channel can be made (several connections, a second one for recovery)
    incoming, outgoing   which ends it can be
    atomic   nobody sees anything of what was sent until a clean send_eof(), so a failure before that ran no guest
    """

    return_path: bool
    multi_channel: bool
    incoming: bool = True
    outgoing: bool = True
    atomic: bool = False


class Interrupt:
    """A wake-up that can be polled beside a file descriptor. Set once, it stays set. Thread-safe."""

    _event = -1
    _close = staticmethod(os.close)  # held on to: the module may be gone when the interpreter ends

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        os.eventfd_write(self._event, 1)

    def is_set(self) -> bool:
        return self.wait(0)

    def check(self) -> None:
        """Raise Interrupted when set."""
        if self.is_set():
            raise Interrupted("cancelled")

    def fileno(self) -> int:
        return self._event

    def wait(self, seconds: float | None) -> bool:
        """Sleep up to `seconds` (None: for ever); True when it was set."""
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))

    def wait_for(self, fd: int, events: int, seconds: float | None = None) -> bool:
        """Wait until poll reports `events` on `fd`. False on timeout; Interrupted when set."""
        poll, event = select.poll(), self._event  # another thread may set and close it meanwhile
        poll.register(event, select.POLLIN)
        poll.register(fd, events)
        ready = poll.poll(None if seconds is None else max(0.0, seconds) * 1000)
        if any(which == event for which, _ in ready):
            raise Interrupted("cancelled")
        return bool(ready)

    def close(self) -> None:
        """Idempotent; happens by itself when nobody has the object any more."""
        if self._event >= 0:
            self._close(self._event)
            self._event = -1

    __del__ = close


class Channel(Closing, ABC):
    """One byte stream.

    peer              who is at the other end, for messages: "tcp:10.0.0.7:4444"
    has_return_path   whether the other direction works too
    """

    peer: str
    has_return_path: bool

    @abstractmethod
    def send(self, *parts: Buffer) -> None:
        """Send all parts, in order, without joining them where the transport can gather.

        Blocks until the transport took them all (memory stays bounded: a slow peer blocks the sender). The parts may be
        changed after it returns. Raises ChannelError; how much had gone out by then is unknown.
        """

    @abstractmethod
    def receive_into(self, view: memoryview) -> int:
        """Receive between 1 and len(view) bytes into the start of `view`; 0 when the peer has ended its stream.

        Blocks until there is at least one byte. A connection that broke raises ChannelError; it never looks like an
        end.
        """

    def try_receive_into(self, view: memoryview) -> int | None:
        """As receive_into(), but None instead of a wait. By default this is two calls; a channel that can ask and
        receive in one overrides it, since a destination receives the whole stream with it."""
        return self.receive_into(view) if self.wait_readable(0) else None

    @abstractmethod
    def wait_readable(self, seconds: float) -> bool:
        """True when receive_into would not block (bytes or the end are there), False after `seconds`."""

    @abstractmethod
    def send_eof(self) -> None:
        """Tell the peer that no more will come; receiving goes on. Every byte sent before still arrives."""

    @abstractmethod
    def abort(self) -> None:
        """From any thread: make every blocked and every later send and receive raise Interrupted. Idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Bytes that were sent still arrive, unless the channel was aborted. Idempotent; never
        raises.

        A call that is blocked in another thread ends soon, and it and every later call except abort() and close() raise
        Interrupted. How much of a blocked send goes out is unknown.
        """


@runtime_checkable
class SendsMemory(Protocol):
    """A channel that sends pieces of memory from where they are, without a Python object for each."""

    def send_memory(self, pieces: NDArray[np.uint64]) -> None:
        """As Channel.send(), for rows (address, length), dtype uint64. The caller keeps the memory alive;
        what changes in it meanwhile is sent as it was or as it is."""


@runtime_checkable
class ReceivesMemory(Protocol):
    """A channel that receives into scattered pieces of memory, without a copy in between."""

    def receive_memory(self, pieces: NDArray[np.uint64]) -> int:
        """As Channel.receive_into(), for the first 1024 rows (address, length), filled in their order. It may wait some
        milliseconds for more, so it is for those who expect much."""


class FileBacked(ABC):
    """What reads a file adds this: the stream may say where in the file something is (mapped-ram does).

    origin   where in the file the stream's first byte is
    """

    origin: int

    @abstractmethod
    def skip(self, count: int) -> None:
        """Pass over the next `count` bytes without reading them; past the end of the file too. Raises ChannelError."""


class Listener(Closing, ABC):
    """A place where peers can dial in. `uri` is what they dial (port 0 has become the real one)."""

    uri: MigrationUri

    @abstractmethod
    def accept(self, interrupt: Interrupt) -> Channel:
        """Wait for the next peer. Raises Interrupted, ChannelError."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening, and remove what was created for it (a socket file). Idempotent; never raises.

        An accept() that is blocked in another thread ends soon, and it and every later one raise ChannelError. Accepted
        channels go on.
        """


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended. `status` is what a shell would say: 127 where there is no such command."""

    status: int
    output: str
    errors: str


class RemoteHost(Closing, ABC):
    """A log-in on another host. `name` is how the user called the host, for messages."""

    name: str

    @abstractmethod
    def run(self, command: Sequence[str], seconds: float) -> CommandResult:
        """Run a command there, and wait for its end, `seconds` at most.

        Its words arrive as they are, whatever the user's shell is. Its standard input ends when the connection does,
        and when this method returns or raises; so a command can watch for that. Raises ChannelError.
        """

    @abstractmethod
    def close(self) -> None:
        """Log out. Idempotent; does not raise."""


def _no_transports(uri: MigrationUri, _context: TransportContext) -> Transport:
    raise UriError(f"'{uri}': no other transports are available here")


@dataclass(frozen=True, slots=True)
class TransportContext:
    """The program around a transport.

    settings   every capability, parameter and property. A transport reads its own parameters, which its plugin declares
               with the hook corefw_settings, when it connects or listens: they may have changed since it was made.
    make       makes the transport of another URI; call `transport()` instead
    """

    settings: Settings = field(default_factory=Settings)
    make: Callable[[MigrationUri, TransportContext], Transport] = _no_transports

    @property
    def any_user(self) -> bool:
        """Whether every user of this host may connect to an address that does not itself keep them out (an abstract
        UNIX socket). By default only the same user and root may."""
        return self.settings.property("allow-any-user")

    def transport(self, uri: MigrationUri | str) -> Transport:
        """The transport of another URI, with the same context: a layer makes the one below it. Raises UriError,
        PluginError."""
        return self.make(MigrationUri.parse(uri) if isinstance(uri, str) else uri, self)


class Transport(ABC):
    """A way to make channels for one URI.

    The constructor checks the URI, raises UriError if it is wrong, and does nothing else.
    """

    features: TransportFeatures

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        self.uri: Final = uri
        self.context: Final = context

    def check_outgoing(self) -> None:
        """Raise UriError when one cannot dial out. A transport whose URIs are not all good for that adds its own."""
        if not self.features.outgoing:
            raise UriError(f"'{self.uri}': it can only receive a migration, not send one")

    def check_incoming(self) -> None:
        """Raise UriError when one cannot wait for peers; as check_outgoing()."""
        if not self.features.incoming:
            raise UriError(f"'{self.uri}': it can only send a migration, not receive one")

    @abstractmethod
    def connect(self, interrupt: Interrupt) -> Channel:
        """Dial out. Raises ChannelError naming the URI and the cause, Interrupted."""

    def log_in(self, interrupt: Interrupt) -> RemoteHost:
        """Reach the host behind this URI, to run commands there; most transports cannot. Raises UriError, ChannelError,
        Interrupted."""
        del interrupt
        raise UriError(f"'{self.uri}': '{self.uri.scheme}:' cannot run commands on the other host")

    @abstractmethod
    def listen(self) -> Listener:
        """Begin to wait for peers; returns at once. Raises ChannelError (address in use, no permission)."""


def receive_exactly(channel: Channel, view: memoryview) -> None:
    """Fill `view`, or raise ChannelClosed naming how many bytes were missing."""
    got = 0
    while got < len(view):
        n = channel.receive_into(view[got:])
        if n == 0:
            raise ChannelClosed(f"{channel.peer} ended the stream {len(view) - got} bytes too early")
        got += n


__all__ = [
    "Buffer",
    "Channel",
    "ChannelError",
    "CommandResult",
    "FileBacked",
    "Interrupt",
    "Listener",
    "ReceivesMemory",
    "RemoteHost",
    "SendsMemory",
    "Transport",
    "TransportContext",
    "TransportFeatures",
    "receive_exactly",
]
