"""A proxy for tcp connections that breaks them when a test says so."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeVar

_T = TypeVar("_T")
TICK: Final = 0.05
"""Seconds that a thread may be in one system call: a socket that was closed lives on until that has returned."""


_Pair = tuple[socket.socket, socket.socket]


class Cut(StrEnum):
    """How a connection breaks."""

    RESET = "reset"  # both ends get RST
    END = "end"  # both ends get FIN, as if the other had closed
    FORWARD = "forward"  # nothing more reaches the destination, which gets FIN; the source notices at its next send
    BACKWARD = "backward"  # the other way round


class CutProxy:
    """Listens on loopback at `uri`, and leads each connection to the address of a URI.

    recorded      what went to the destination, if `record` was asked for
    connections   how many there have been
    before_each   called before the proxy connects to the destination
    """

    def __init__(self, target: str, *, record: bool = False) -> None:
        self.recorded = bytearray()
        self.connections = 0
        self.before_each: Callable[[], object] = lambda: None
        self._record = record
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._pair: _Pair | None = None
        self._pairs: list[_Pair] = []
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._passed = 0
        self._run(self._accept)

    def lead_to(self, target: str) -> None:
        """From now on connections go there."""
        self._target = target

    def has_passed(self, count: int) -> Callable[[], bool]:
        """Whether `count` more bytes have gone to the destination, counted from now."""
        before = self._passed
        return lambda: self._passed >= before + count

    def inject(self, data: bytes) -> None:
        """Send bytes to the destination over the newest connection, as if they were the source's."""
        assert self._pair is not None, "there is no connection"
        self._pair[1].sendall(data)

    def cut(self, how: Cut) -> None:
        """Break the newest connection."""
        assert self._pair is not None, "there is no connection"
        _cut(self._pair, how)

    def cut_all(self, how: Cut) -> None:
        """Break every connection."""
        for pair in self._pairs:
            with contextlib.suppress(OSError):  # it was broken before
                _cut(pair, how)

    def _run(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                source, _ = self._listener.accept()
                host, _, port = self._target.removeprefix("tcp:").rpartition(":")
                self._sockets.append(source)
                self.before_each()
                destination = socket.create_connection((host, int(port)))
                self._sockets.append(destination)
                for one in (source, destination):
                    one.settimeout(TICK)
                self._pair = source, destination
                self._pairs.append(self._pair)
                self.connections += 1
                self._run(self._pump, source, destination, True)
                self._run(self._pump, destination, source, False)

    def _pump(self, one: socket.socket, other: socket.socket, forward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := _patiently(lambda: one.recv(1 << 16)):
                rest = memoryview(data)
                while rest:
                    rest = rest[_patiently(partial(other.send, rest)) :]
                if forward:
                    self._passed += len(data)
                    if self._record:
                        self.recorded += data
        _shut(other, socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._sockets:
            _shut(one, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()


def _cut(pair: _Pair, how: Cut) -> None:
    source, destination = pair
    match how:
        case Cut.RESET:
            for one in pair:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.close()
        case Cut.END:
            for one in pair:
                _shut(one, socket.SHUT_RDWR)
        case Cut.FORWARD:
            _shut(destination, socket.SHUT_WR)
        case Cut.BACKWARD:
            _shut(source, socket.SHUT_WR)


def _patiently(call: Callable[[], _T]) -> _T:
    while True:
        with contextlib.suppress(TimeoutError):
            return call()


def _shut(one: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(how)


def listens(uri: str) -> bool:
    """Whether a process listens there."""
    host, _, port = uri.removeprefix("tcp:").rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # former connections may be in TIME_WAIT
        try:
            probe.bind((host, int(port)))
        except OSError:
            return True
    return False
