"""Byte streams between two hosts, and the interface of the transports that make them.

Invariant: a channel moves bytes whole and in order, or raises. It does not know what they mean.

    Transport          the driver of one URI: makes channels by dialling, or through a Listener
    TransportContext   what a transport may use of the program around it: settings, other transports
    Listener           accepts peers at an address
    Channel            one stream; bytes flow back on it if `has_return_path`
    Interrupt          ends a wait in connect() and accept() from another thread

Threads: one thread at a time may send on a channel, and one may receive. abort() and close() may be called from any
thread at any time, and every call that is blocked then raises Interrupted soon. After a ChannelError a channel is good
for close() only, with one exception: after a failed send, what the peer sent before can still be received.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from corefw.closing import Closing
from corefw.errors import ChannelClosed, ChannelError, Interrupted, UriError
from corefw.settings import Settings
from corefw.uri import MigrationUri

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview
"""What can be sent: contiguous bytes. Pass a NumPy array as `array.data.cast("B")`."""


@dataclass(frozen=True, slots=True)
class TransportFeatures:
    """What a transport can do, known before anything is sent.

    return_path          bytes flow back from the destination, so it can confirm that it has the guest
    multi_channel        more than one channel can be made (several connections, or another one for recovery)
    incoming, outgoing   which ends it can be
    atomic               what was sent becomes visible only with send_eof(): after a failure before that, no guest runs
    """

    return_path: bool
    multi_channel: bool
    incoming: bool = True
    outgoing: bool = True
    atomic: bool = False


class Interrupt:
    """An event that can be polled together with a file descriptor. It stays set until clear(). Thread-safe.

    Making and setting one does not fail in a process that has no descriptor left. What waits for it raises ChannelError
    there.
    """

    _event = -1
    _close = staticmethod(os.close)  # the module may be gone when the interpreter ends

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards what follows; a signal handler may set it at any time
        self._set = False
        self._closed = False
        with contextlib.suppress(ChannelError):
            self.fileno()

    def set(self) -> None:
        with self._lock:
            self._set = True
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def clear(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            self._set = False
            if self._event >= 0:
                os.eventfd_read(self._event)

    def is_set(self) -> bool:
        return self._set

    def check(self) -> None:
        """Raise Interrupted if it is set."""
        if self._set:
            raise Interrupted("cancelled")

    def fileno(self) -> int:
        """Readable while it is set; -1 after close(). Raises ChannelError."""
        if self._event < 0:
            with self._lock:
                if self._event < 0 and not self._closed:
                    try:
                        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                    except OSError as error:
                        raise ChannelError(f"cannot wait: {str(error.strerror).lower()}") from None
                    if self._set:
                        os.eventfd_write(self._event, 1)
        return self._event

    def wait(self, seconds: float | None) -> bool:
        """Wait up to `seconds` (None: without limit); True if it is set."""
        if self._set:
            return True
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))

    def wait_for(self, fd: int, events: int, seconds: float | None = None) -> bool:
        """Wait until poll reports `events` on `fd`; False after `seconds`. Raises Interrupted if it is set."""
        poll, event = select.poll(), self.fileno()  # another thread may set and close it meanwhile
        poll.register(event, select.POLLIN)
        poll.register(fd, events)
        ready = poll.poll(None if seconds is None else max(0.0, seconds) * 1000)
        if any(which == event for which, _ in ready):
            raise Interrupted("cancelled")
        return bool(ready)

    def close(self) -> None:
        """Close the descriptor. Idempotent; also happens when the object is collected."""
        with self._lock:
            self._closed = True
            if self._event >= 0:
                self._close(self._event)
                self._event = -1

    __del__ = close


class Channel(Closing, ABC):
    """One byte stream.

    peer              the other end, for messages: "tcp:10.0.0.7:4444"
    has_return_path   whether the other direction works too
    """

    peer: str
    has_return_path: bool

    @abstractmethod
    def send(self, *parts: Buffer) -> None:
        """Send all parts, in order.

        Blocks until the transport has taken them all; a slow peer blocks the sender, so memory stays bounded. The parts
        may be changed once it returns. Raises ChannelError; how much was sent is then unknown.
        """

    @abstractmethod
    def receive_into(self, view: memoryview) -> int:
        """Receive between 1 and len(view) bytes into the start of `view`; 0 once the peer has ended its stream.

        Blocks until there is at least one byte. Raises ChannelError if the connection broke: that never looks like an
        end.
        """

    def try_receive_into(self, view: memoryview) -> int | None:
        """As receive_into(), but returns None instead of waiting.

        A destination receives the whole stream with it, so override it if one call can both check and receive.
        """
        return self.receive_into(view) if self.wait_readable(0) else None

    @abstractmethod
    def wait_readable(self, seconds: float) -> bool:
        """True once receive_into() would not block, because of bytes or the end; False after `seconds`."""

    def limit_unsent(self, count: int) -> None:
        """From now on let send() wait while the network has still to take about `count` bytes, so that what is sent
        next arrives soon. A transport without such a limit ignores it. Does not raise."""

    @abstractmethod
    def send_eof(self) -> None:
        """End this direction; receiving goes on. Every byte sent before still arrives."""

    @abstractmethod
    def abort(self) -> None:
        """Break the connection: every blocked and every later call raises Interrupted. From any thread; idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Bytes that were sent still arrive, unless the channel was aborted. Idempotent; never
        raises.

        A call that is blocked in another thread ends soon, and it and every later call except abort() and close() raise
        Interrupted. How much of a blocked send goes out is unknown.
        """


class SendsMemory(ABC):
    """A base class for channels that can send pieces of memory without a Python object for each."""

    @abstractmethod
    def send_memory(self, pieces: NDArray[np.uint64]) -> None:
        """As Channel.send(), for rows (address, length) of shape (n, 2), C-contiguous.

        The caller keeps the memory alive. Of bytes that change meanwhile, the old or the new value is sent.
        """


class ReceivesMemory(ABC):
    """A base class for channels that can receive into scattered pieces of memory without a copy."""

    @abstractmethod
    def receive_memory(self, pieces: NDArray[np.uint64]) -> int:
        """As Channel.receive_into(), for rows (address, length) of shape (n, 2), C-contiguous; fills the first 1024 in
        order. It may wait some milliseconds for more bytes, so use it if many are expected."""


class ReceivesFromSocket(ABC):
    """A base class for channels where the stream's bytes come from a connected stream socket as they are, for compiled
    code that receives many pieces by itself."""

    @abstractmethod
    def receive_from_socket(self, receive: Callable[[int], int]) -> int:
        """Call `receive(descriptor)`, and return how many bytes it received; 0 at the end of the stream, without the
        call if that was known.

        `receive` does not wait for long and raises OSError as recvmsg(2) does: it is called again after BlockingIOError
        (no byte came), and other errors are translated. It must not use the descriptor once it has returned. Waits for
        the first byte, and raises, as Channel.receive_into().
        """


class SendsToSocket(ABC):
    """A base class for channels where the stream's bytes go to a connected stream socket as they are, for compiled code
    that sends many pieces by itself."""

    @abstractmethod
    def send_to_socket(self, send: Callable[[int], int]) -> int:
        """Call `send(descriptor)`, and return how many bytes it sent.

        `send` does not wait for long and raises OSError as sendmsg(2) does: it is called again after BlockingIOError
        (no byte went), and other errors are translated. It must not use the descriptor once it has returned. Raises as
        Channel.send().
        """


class LimitsSilence(ABC):
    """A base class for channels that can find out whether the peer's host still answers, without sending a byte of the
    stream."""

    @abstractmethod
    def limit_silence(self, seconds: float) -> None:
        """Break the connection if the host has not answered for so long. Does not raise."""


class FileBacked(ABC):
    """A base class for channels that read a file, for streams that refer to places in it (mapped-ram).

    origin   offset in the file of the stream's first byte
    """

    origin: int

    @abstractmethod
    def skip(self, count: int) -> None:
        """Skip `count` bytes, even past the end of the file. Raises ChannelError."""


class Listener(Closing, ABC):
    """An address at which peers can connect. `uri` is what they dial, with the real port where port 0 was asked for."""

    uri: MigrationUri

    @abstractmethod
    def accept(self, interrupt: Interrupt) -> Channel:
        """Wait for the next peer. One thread at a time. Raises Interrupted, ChannelError."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening, and remove what was created for it (a socket file). Idempotent; never raises.

        An accept() that is blocked in another thread ends soon, and it and every later one raise ChannelError. Accepted
        channels go on.
        """


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended. `status` is the exit status as a shell reports it: 127 if there is no such command."""

    status: int
    output: str
    errors: str


class RemoteHost(Closing, ABC):
    """A login on another host. `name` is the host as the user wrote it, for messages."""

    name: str

    @abstractmethod
    def run(self, command: Sequence[str], seconds: float) -> CommandResult:
        """Run a command there and wait up to `seconds` for its end. Raises ChannelError.

        Its words arrive unchanged, whatever the user's shell is. Its standard input ends when this method returns or
        raises, and when the connection breaks, so a command can watch for that.
        """

    @abstractmethod
    def close(self) -> None:
        """Log out. Idempotent; never raises."""


def _no_transports(uri: MigrationUri, _context: TransportContext) -> Transport:
    raise UriError(f"'{uri}': no other transports are available here")


@dataclass(frozen=True, slots=True)
class TransportContext:
    """What a transport may use of the program around it.

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
        """Raise UriError if this URI cannot be dialled. Override it if that depends on the address; call super()'s."""
        if not self.features.outgoing:
            raise UriError(f"'{self.uri}': it can only receive a migration, not send one")

    def check_incoming(self) -> None:
        """Raise UriError if one cannot listen at this URI; as check_outgoing()."""
        if not self.features.incoming:
            raise UriError(f"'{self.uri}': it can only send a migration, not receive one")

    @abstractmethod
    def connect(self, interrupt: Interrupt) -> Channel:
        """Dial. Raises Interrupted, or ChannelError that names the URI and the cause."""

    def log_in(self, interrupt: Interrupt) -> RemoteHost:
        """Log in to the host behind this URI, to run commands there. Raises UriError (most transports cannot),
        ChannelError, Interrupted."""
        del interrupt
        raise UriError(f"'{self.uri}': '{self.uri.scheme}:' cannot run commands on the other host")

    @abstractmethod
    def listen(self) -> Listener:
        """Start to listen. Raises ChannelError (address in use, no permission)."""


def receive_exactly(channel: Channel, view: memoryview) -> None:
    """Fill `view`. Raises ChannelError; ChannelClosed, with the number of missing bytes, if the stream ends first."""
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
    "LimitsSilence",
    "Listener",
    "ReceivesMemory",
    "RemoteHost",
    "SendsMemory",
    "SendsToSocket",
    "Transport",
    "TransportContext",
    "TransportFeatures",
    "receive_exactly",
]
