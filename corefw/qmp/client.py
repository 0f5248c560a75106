"""A QMP client, for our engines and for a real QEMU.

Invariant: a call returns or raises within its time, and takes no more than a bounded amount of what the peer sends. The
module is light to import, because every command of the command line starts with it.

Threads: one at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

from corefw.closing import Closing
from corefw.errors import ChannelClosed, ChannelError
from corefw.net.fdpassing import send_with_fds
from corefw.qmp.address import QmpAddress, parse_address
from corefw.qmp.json_stream import REPLY_LIMIT, JsonStream, Malformed
from corefw.qmp.protocol import ErrorClass, QmpError, Request, write_request
from corefw.uri import UnixAddress

CONNECT_SECONDS: Final = 10.0
REPLY_SECONDS: Final = 600.0
"""A command may stop a guest or check all of its memory before it answers."""

_CHUNK: Final = 1 << 16
_BUSY: Final = "it sends no greeting (QEMU serves one client at a time: is another one connected?)"
_RETRY: Final = 0.02
_CREDENTIALS: Final = Struct("3i")  # pid, uid, gid
_EVENTS: Final = 1 << 16
"""Events that are kept for a caller who does not ask for them; beyond that the oldest are dropped."""


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """`timestamp` in seconds since 1970."""

    name: str
    data: Mapping[str, Any]
    timestamp: float


class QmpClient(Closing):
    """A connection that has negotiated. Use it with `with`.

    address    what it is connected to
    greeting   how the server introduced itself: {"version": {...}, "capabilities": [...]}
    """

    def __init__(self, address: QmpAddress | str, *, timeout: float = CONNECT_SECONDS) -> None:
        """Connect and negotiate, within `timeout` seconds. Raises UriError, ChannelError."""
        self.address: Final = parse_address(address) if isinstance(address, str) else address
        self._stream = JsonStream(REPLY_LIMIT)
        self._messages: deque[dict[str, Any]] = deque()
        self._events: deque[QmpEvent] = deque(maxlen=_EVENTS)
        self._ids = itertools.count(1)
        deadline = time.monotonic() + timeout
        self._socket = self._connected(timeout)
        try:
            self.greeting: Final[Mapping[str, Any]] = self._greeting(deadline)
            self.execute("qmp_capabilities", timeout=max(0.0, deadline - time.monotonic()))
        except BaseException:
            self.close()
            raise

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        fds: Sequence[int] = (),
        *,
        timeout: float = REPLY_SECONDS,
    ) -> Any:
        """Run a command, and return what it returned. `fds` are sent with it (UNIX sockets only) and stay the caller's.

        Raises QmpError if it was refused, ChannelError if the connection broke or no reply came in time.
        """
        id_ = f"migfw-{next(self._ids)}"
        self._send(write_request(Request(command, arguments or {}, id_)), fds)
        deadline = time.monotonic() + timeout
        while (message := self._next(deadline)) is not None:
            if message.get("id") != id_ and not ("error" in message and "id" not in message):
                continue  # the late reply to a command that timed out
            if "error" in message:
                raise _refusal(message["error"])
            return message.get("return")
        raise ChannelError(f"{self.address} did not answer '{command}' within {timeout:g} s")

    def wait_event(self, seconds: float) -> QmpEvent | None:
        """The oldest event that was not returned yet; None if none comes within `seconds`. Raises ChannelError."""
        deadline = time.monotonic() + seconds
        while not self._events:
            if self._next(deadline, or_event=True) is None and not self._events:
                return None
        return self._events.popleft()

    def events(self, seconds: float) -> Iterator[QmpEvent]:
        """Yield events for `seconds`, beginning with those that came earlier. Raises ChannelError."""
        deadline = time.monotonic() + seconds
        while (event := self.wait_event(max(0.0, deadline - time.monotonic()))) is not None:
            yield event

    def server_process(self) -> int | None:
        """The id of the process that listens at the address; None if it is on another host or not visible here."""
        if self._socket.family != socket.AF_UNIX:
            return None
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(credentials)[0]
        return pid or None

    def close(self) -> None:
        """Idempotent; does not raise."""
        self._socket.close()

    # -- the connection --------------------------------------------------------------------------------------------

    def _connected(self, timeout: float) -> socket.socket:
        address = self.address
        try:
            if not isinstance(address, UnixAddress):
                return socket.create_connection((address.host or "localhost", address.port), timeout)
            return _connected_unix(address.path, timeout)
        except BlockingIOError:
            raise ChannelError(f"no migfw or QEMU answers at {address}: {_BUSY}") from None
        except OSError as error:
            raise ChannelError(f"no migfw or QEMU answers at {address}: {error.strerror or error}") from None

    def _greeting(self, deadline: float) -> Mapping[str, Any]:
        message = self._next(deadline)
        if message is None:
            raise ChannelError(f"no migfw or QEMU answers at {self.address}: {_BUSY}")
        greeting = message.get("QMP")
        if not isinstance(greeting, dict):
            raise self._not_qmp("its first message is not a greeting")
        return greeting

    def _not_qmp(self, why: str) -> ChannelError:
        return ChannelError(f"what answers at {self.address} does not speak QMP: {why}")

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        try:
            self._socket.settimeout(REPLY_SECONDS)
            if fds and not isinstance(self.address, UnixAddress):
                raise ChannelError(f"{self.address}: file descriptors can be passed over a UNIX socket only")
            send_with_fds(self._socket, data, fds)
        except OSError as error:
            raise ChannelClosed(f"the connection to {self.address} broke: {error.strerror or error}") from None

    def _next(self, deadline: float, *, or_event: bool = False) -> dict[str, Any] | None:
        """The next message that is not an event; None at the deadline, or with `or_event` once an event came. Events
        are kept."""
        late = False
        while True:
            while self._messages:
                message = self._messages.popleft()
                if "event" not in message:
                    return message
                self._events.append(_event(message))
                if or_event:
                    return None
            if late or not self._receive(deadline):
                return None
            late = time.monotonic() >= deadline

    def _receive(self, deadline: float) -> bool:
        """Wait for data and read it; False at the deadline."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
        try:
            data = self._socket.recv(_CHUNK)
        except OSError as error:
            raise ChannelClosed(f"the connection to {self.address} broke: {error.strerror or error}") from None
        if not data:
            raise ChannelClosed(f"{self.address} closed the connection")
        for item in self._stream.feed(data):
            if isinstance(item, Malformed):
                raise self._not_qmp(item.reason)
            if not isinstance(item, dict):
                raise self._not_qmp("a message that is not an object")
            self._messages.append(item)
        return True


def _connected_unix(path: str, timeout: float) -> socket.socket:
    """Connect. Raises OSError: BlockingIOError if the backlog stayed full."""
    deadline = time.monotonic() + timeout
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    try:
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY)
    except BaseException:
        sock.close()
        raise


def _event(message: Mapping[str, Any]) -> QmpEvent:
    seconds = 0.0
    data = message.get("data")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        stamp = message["timestamp"]
        seconds = float(stamp["seconds"]) + float(stamp["microseconds"]) / 1_000_000
    return QmpEvent(str(message["event"]), data if isinstance(data, dict) else {}, seconds)


def _refusal(error: object) -> QmpError:
    if not isinstance(error, dict):
        return QmpError(str(error))
    return QmpError(str(error.get("desc", error)), str(error.get("class", ErrorClass.GENERIC)))


__all__ = ["QmpClient", "QmpError", "QmpEvent"]
