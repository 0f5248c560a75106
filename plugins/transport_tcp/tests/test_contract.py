"""tcp: and unix: keep the contract of corefw.channel."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corefw_transport_tcp import TcpTransport, UnixTransport

from corefw.testing.transport import TransportCase, applicable, check_transport

WRONG_TCP = ("tcp:nohost", "tcp:host:port", "tcp:host:65536", "tcp:::1:80", "tcp:host:-1", "tcp:[::1:80")
WRONG_UNIX = ("unix:" + "x" * 108, "unix:@" + "x" * 108, "unix:@", "unix:a\0b")

COUNT = itertools.count()


@contextlib.contextmanager
def stuck_tcp() -> Iterator[str]:
    """A listener whose backlog is full, so that the kernel does not answer the next client."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def stuck_unix() -> Iterator[str]:
    name = f"\0migfw-test-stuck-{id(COUNT)}"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(name)
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(name)
        yield f"unix:@{name[1:]}"


def tcp(listen: str) -> Callable[[Path], TransportCase]:
    return lambda _: TransportCase(
        transport=TcpTransport,
        listen=lambda: listen,
        wrong=WRONG_TCP,
        refused="tcp:127.0.0.1:1",
        stuck=stuck_tcp,
    )


def unix_path(folder: Path) -> TransportCase:
    return TransportCase(
        transport=UnixTransport,
        listen=lambda: f"unix:{folder}/{next(COUNT)}",
        wrong=WRONG_UNIX,
        refused=f"unix:{folder}/nobody",
        shows_breaks=False,
    )


def unix_abstract(_: Path) -> TransportCase:
    return TransportCase(
        transport=UnixTransport,
        listen=lambda: f"unix:@migfw-test-{id(COUNT)}-{next(COUNT)}",
        refused=f"unix:@migfw-test-{id(COUNT)}-nobody",
        stuck=stuck_unix,
        shows_breaks=False,
    )


CASES = {
    "ipv4": tcp("tcp:127.0.0.1:0"),
    "ipv6": tcp("tcp:[::1]:0"),
    "unix": unix_path,
    "abstract": unix_abstract,
}


MATRIX = [(name, check) for name, case in CASES.items() for check in applicable(case(Path()))]


@pytest.mark.parametrize(("case", "check"), MATRIX)
def test_contract(case: str, check: str, short_folder: Path) -> None:
    assert check_transport(CASES[case](short_folder), only=[check]) == [check]
