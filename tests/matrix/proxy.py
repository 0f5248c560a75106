"""A proxy for tcp and unix sockets that stops at a message of the migration, or at a byte, and breaks there."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Final, Self

OVERLAP: Final = 32
"""Bytes that are held back as long as more come: a message may begin in them."""

QUIET: Final = 0.03
"""Seconds without bytes after which nothing is held back."""


class Cut(StrEnum):
    """How the connection breaks."""

    RESET = "RST to both"
    END = "FIN to both"
    HALF_FORWARD = "FIN to the destination"
    HALF_BACKWARD = "FIN to the source"
    LOSE_FORWARD = "nothing reaches the destination"
    LOSE_BACKWARD = "nothing reaches the source"


@dataclass(slots=True)
class Watch:
    """Stops one direction where `pattern` matches, or after `count` bytes, and then calls `action` once."""

    forward: bool
    pattern: re.Pattern[bytes] | None
    skip: int
    action: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)

    def find(self, before: bytes, data: bytes, passed: int) -> int | None:
        """How many of these bytes still pass, after `passed` others that ended with `before`; None for all."""
        if self.done.is_set():
            return None
        if self.pattern is None:
            return max(0, self.skip - passed) if passed + len(data) > self.skip else None
        found = self.pattern.search(before + data, len(before))
        return min(found.start() - len(before) + self.skip, len(data)) if found else None


@dataclass(slots=True)
class Pair:
    """A connection, and the directions of which nothing more arrives (True: to the destination)."""

    source: socket.socket
    destination: socket.socket
    lost: set[bool] = field(default_factory=set)


class Proxy:
    """Leads each connection to its address to a target. Addresses are URIs with `tcp:` or `unix:`."""

    def __init__(self, folder: Path, target: str) -> None:
        self._target = target
        self._watch: Watch | None = None
        self._pair: Pair | None = None
        if target.startswith("unix:"):
            path = folder / "proxy"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            self.uri = f"unix:{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def lead_to(self, target: str) -> None:
        """From now on connections go there."""
        self._target = target

    def stop_at(self, watch: Watch) -> None:
        self._watch = watch

    def cut(self, how: Cut) -> None:
        """Break the present connection."""
        pair = self._pair
        assert pair is not None, "there is no connection"
        match how:
            case Cut.RESET:
                pair.lost |= {True, False}
                for one in (pair.source, pair.destination):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    _shut(one, socket.SHUT_RD)  # wakes its pump: a socket that is in a system call lives on
                    one.close()
            case Cut.END:
                for one in (pair.source, pair.destination):
                    _shut(one, socket.SHUT_RDWR)
            case Cut.HALF_FORWARD:
                pair.lost.add(True)
                _shut(pair.destination, socket.SHUT_WR)
            case Cut.HALF_BACKWARD:
                pair.lost.add(False)
                _shut(pair.source, socket.SHUT_WR)
            case Cut.LOSE_FORWARD:
                pair.lost.add(True)
            case Cut.LOSE_BACKWARD:
                pair.lost.add(False)

    def _run(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                source, _ = self._listener.accept()
                try:
                    destination = _connected(self._target)
                except OSError:
                    source.close()
                    continue
                self._sockets += [source, destination]
                self._pair = pair = Pair(source, destination)
                self._run(self._pump, pair, True)
                self._run(self._pump, pair, False)

    def _pump(self, pair: Pair, forward: bool) -> None:
        one, other = (pair.source, pair.destination) if forward else (pair.destination, pair.source)
        try:
            self._carry(pair, one, other, forward)
        except OSError:
            if forward not in pair.lost:
                _shut(one, socket.SHUT_RDWR)
        if forward not in pair.lost:
            _shut(other, socket.SHUT_WR)

    def _carry(self, pair: Pair, one: socket.socket, other: socket.socket, forward: bool) -> None:
        """Until `one` ends. Raises OSError if either breaks."""
        held, before, data, passed = bytearray(), b"", b"more", 0

        def let_pass(count: int) -> None:
            nonlocal passed, before
            passed += count
            before = (before + held[:count])[-OVERLAP:]
            if forward not in pair.lost:
                other.settimeout(None)
                other.sendall(held[:count])
            del held[:count]

        while data:
            one.settimeout(QUIET if held else None)
            try:
                data = one.recv(1 << 16)
            except TimeoutError:
                let_pass(len(held))
                continue
            held += data
            watch = self._watch
            if watch is not None and watch.forward is forward:
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
        for one in self._sockets:
            _shut(one, socket.SHUT_RDWR)
            one.close()
        if self.uri.startswith("unix:"):
            Path(self.uri.removeprefix("unix:")).unlink(missing_ok=True)


def _connected(uri: str) -> socket.socket:
    if uri.startswith("unix:"):
        found = socket.socket(socket.AF_UNIX)
        found.connect(uri.removeprefix("unix:"))
        return found
    host, _, port = uri.rpartition("tcp:")[2].rpartition(":")
    return socket.create_connection((host, int(port)))


def _shut(one: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(how)
