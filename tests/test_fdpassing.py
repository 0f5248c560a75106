"""Descriptors that travel over a socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.net.fdpassing import receive_with_fds, send_with_fds

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_a_descriptor_arrives_with_the_first_byte(pair: Pair) -> None:
    reader, writer = os.pipe()
    send_with_fds(pair[0], b"message", [reader])
    os.write(writer, b"through the pipe")
    data, (fd,) = receive_with_fds(pair[1], 3, 4)
    assert data == b"mes"
    assert os.read(fd, 100) == b"through the pipe"
    assert not os.get_inheritable(fd)
    assert receive_with_fds(pair[1], 100, 4) == (b"sage", [])
    for one in (reader, writer, fd):
        os.close(one)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_more_than_are_expected_are_closed(pair: Pair, most: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    send_with_fds(pair[0], b"x", [0, 0, 0, 0, 0])
    _, fds = receive_with_fds(pair[1], 1, most)
    assert len(fds) == most
    assert len(list(Path("/proc/self/fd").iterdir())) == before + most
    for fd in fds:
        os.close(fd)


def test_long_messages_and_ends(pair: Pair) -> None:
    send_with_fds(pair[0], b"x" * 100_000, [])
    got = b""
    while len(got) < 100_000:
        got += receive_with_fds(pair[1], 1 << 20, 1)[0]
    pair[0].close()
    assert receive_with_fds(pair[1], 10, 1) == (b"", [])


def test_over_tcp_there_are_none() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        server.accept()[0] as other,
    ):
        send_with_fds(one, b"bytes", [])
        assert receive_with_fds(other, 100, 4) == (b"bytes", [])
