"""A proxy for tcp and unix sockets that breaks connections on request, or at a message of the migration."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

_T = TypeVar("_T")

TICK: Final = 0.03
"""Maximum seconds in one system call: a closed socket stays open until the call has returned."""

OVERLAP: Final = 32
"""Bytes to hold back, for at most a TICK, while searching for a message that may begin in them."""


class Cut(StrEnum):
    """How a connection breaks."""

    RESET = "RST to both"
    END = "FIN to both"
    HALF_FORWARD = "FIN to the destination"
    HALF_BACKWARD = "FIN to the source"
    LOSE_FORWARD = "nothing reaches the destination"
    LOSE_BACKWARD = "nothing reaches the source"


BREAKS: Final = (Cut.RESET, Cut.END, Cut.HALF_FORWARD, Cut.HALF_BACKWARD)
"""Cuts that both sides notice at once. Only a limit on silence reveals the others."""


@dataclass(slots=True)
class Watch:
    """Stops one direction where `pattern` matches, or after `skip` bytes, and then calls `action` once."""

    forward: bool
    pattern: re.Pattern[bytes] | None
    skip: int
    action: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)

    def find(self, before: bytes, data: bytes, passed: int) -> int | None:
        """How many of these bytes to let pass, after `passed` others that ended with `before`; None for all."""
        if self.pattern is None:
            return max(0, self.skip - passed) if passed + len(data) > self.skip else None
        found = self.pattern.search(before + data, len(before))
        return min(found.start() - len(before) + self.skip, len(data)) if found else None


@dataclass(slots=True)
class Connection:
    """The two sockets, and the directions in which nothing more is forwarded (True: to the destination)."""

    source: socket.socket
    destination: socket.socket
    lost: set[bool] = field(default_factory=set)

    def cut(self, how: Cut) -> None:
        match how:
            case Cut.RESET:
                self.lost |= {True, False}
                for one in (self.source, self.destination):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.close()
            case Cut.END:
                for one in (self.source, self.destination):
                    _shut(one, socket.SHUT_RDWR)
            case Cut.HALF_FORWARD:
                self.lost.add(True)
                _shut(self.destination, socket.SHUT_WR)
            case Cut.HALF_BACKWARD:
                self.lost.add(False)
                _shut(self.source, socket.SHUT_WR)
            case Cut.LOSE_FORWARD:
                self.lost.add(True)
            case Cut.LOSE_BACKWARD:
                self.lost.add(False)


class CutProxy:
    """Forwards connections from its address `uri` to a target. Both are URIs with `tcp:` or `unix:`.

    recorded      the bytes sent to the destination, if `record` is true
    connections   number of connections so far
    hung_up       number of connections whose source knows that the destination sends no more
    before_each   called before the proxy connects to the destination
    """

    def __init__(self, target: str, *, record: bool = False) -> None:
        self.recorded = bytearray()
        self.connections = self.hung_up = 0
        self.before_each: Callable[[], object] = lambda: None
        self._record = record
        self._target = target
        self._watch: Watch | None = None
        self._passed = 0
        if target.startswith("unix:"):
            path = Path(target.removeprefix("unix:")).with_name("proxy")
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            self.uri = f"unix:{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._made: list[Connection] = []
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def lead_to(self, target: str) -> None:
        """Set the target for further connections."""
        self._target = target

    def stop_at(self, watch: Watch) -> None:
        self._watch = watch

    def has_passed(self, count: int) -> Callable[[], bool]:
        """Return a condition: whether `count` more bytes have gone to the destination, counted from now."""
        before = self._passed
        return lambda: self._passed >= before + count

    def inject(self, data: bytes) -> None:
        """Send bytes to the destination over the newest connection, as if they were the source's."""
        _send_all(self._newest().destination, data)

    def answer(self, data: bytes) -> None:
        """Send bytes to the source over the oldest connection, as if they were the destination's. For a Watch that has
        stopped that direction, so that they do not come in the middle of a message."""
        _send_all(self._made[0].source, data)

    def cut(self, how: Cut) -> None:
        """Break the newest connection."""
        self._newest().cut(how)

    def cut_all(self, how: Cut) -> None:
        """Break every connection."""
        for connection in self._made:
            with contextlib.suppress(OSError):  # it was broken before
                connection.cut(how)

    def _newest(self) -> Connection:
        assert self._made, "there is no connection"
        return self._made[-1]

    def _run(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                source, _ = self._listener.accept()
                self.before_each()
                try:
                    destination = _connected(self._target)
                except OSError:
                    source.close()
                    continue
                for one in (source, destination):
                    one.settimeout(TICK)
                    self._sockets.append(one)
                connection = Connection(source, destination)
                self._made.append(connection)
                self.connections += 1
                self._run(self._pump, connection, True)
                self._run(self._pump, connection, False)

    def _pump(self, connection: Connection, forward: bool) -> None:
        one, other = connection.source, connection.destination
        if not forward:
            one, other = other, one
        try:
            self._carry(connection, one, other, forward)
        except OSError:
            if forward not in connection.lost:
                _shut(one, socket.SHUT_RDWR)
        if forward not in connection.lost:
            _shut(other, socket.SHUT_WR)
            self.hung_up += not forward

    def _carry(self, connection: Connection, one: socket.socket, other: socket.socket, forward: bool) -> None:
        """Forward one direction until it ends. Raises OSError if either socket breaks."""
        held, before, data, passed = bytearray(), b"", b"more", 0

        def let_pass(count: int) -> None:
            nonlocal passed, before
            passing = bytes(held[:count])
            del held[:count]
            passed += count
            before = (before + passing)[-OVERLAP:]
            if forward not in connection.lost:
                _send_all(other, passing)
                if forward:
                    self._passed += count
                    self.recorded += passing if self._record else b""

        while data:
            try:
                data = one.recv(1 << 16)
            except TimeoutError:
                let_pass(len(held))
                continue
            held += data
            watch = self._watch
            if watch is None or watch.forward is not forward or watch.done.is_set():
                let_pass(len(held))
                continue
            stop = watch.find(before, bytes(held), passed)
            if stop is not None:
                let_pass(stop)
                watch.done.set()
                watch.action()
            let_pass(max(0, len(held) - OVERLAP) if data else len(held))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _shut(self._listener, socket.SHUT_RDWR)
        self._threads[0].join()  # it accepts: no further connection comes
        for one in self._sockets:
            _shut(one, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()
        if self.uri.startswith("unix:"):
            Path(self.uri.removeprefix("unix:")).unlink(missing_ok=True)


def _connected(uri: str) -> socket.socket:
    if uri.startswith("unix:"):
        found = socket.socket(socket.AF_UNIX)
        found.connect(uri.removeprefix("unix:"))
        return found
    return socket.create_connection(host_and_port(uri))


def _send_all(one: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[_patiently(partial(one.send, rest)) :]


def _patiently(call: Callable[[], _T]) -> _T:
    while True:
        with contextlib.suppress(TimeoutError):
            return call()


def _shut(one: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(how)


def host_and_port(uri: str) -> tuple[str, int]:
    """Host and port of a URI that ends with a TCP address."""
    host, _, port = uri.rpartition("tcp:")[2].rpartition(":")
    return host, int(port)


def listens(uri: str) -> bool:
    """Whether a process listens at this address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # former connections may be in TIME_WAIT
        try:
            probe.bind(host_and_port(uri))
        except OSError:
            return True
    return False
