"""Pieces of memory in system calls: complete and in order, however many bytes the kernel accepts at a time."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from corefw.net import IOV_MAX, iovec


def pieces(*arrays: NDArray[np.uint8]) -> iovec.Iovecs:
    return np.array([[array.ctypes.data, array.nbytes] for array in arrays], dtype=np.uint64).reshape(-1, 2)


def receive(sock: socket.socket, into: bytearray, slowly: bool = False) -> None:
    while data := sock.recv(1 << 16):
        into += data
        if slowly:
            time.sleep(0.0005)


def test_rows_that_lie_apart_are_pieces_and_others_one() -> None:
    buffer = np.arange(60, dtype=np.uint8).reshape(6, 10)
    assert len(iovec.rows(buffer[:, 2:])) == 6
    assert iovec.rows(buffer[2:4]).tolist() == [[buffer.ctypes.data + 20, 20]]
    assert iovec.rows(buffer[::2]).tolist() == [[buffer.ctypes.data + 20 * i, 10] for i in range(3)]
    assert iovec.rows(buffer[::-1])[0, 0] == buffer.ctypes.data + 50


def test_pwritev_of_more_pieces_than_one_call_takes() -> None:
    data = np.random.default_rng(1).integers(0, 256, (5000, 24), dtype=np.uint8)
    fd = os.memfd_create("test")
    try:
        iovec.pwritev(fd, iovec.rows(data[:, 8:]), 100)
        assert os.pread(fd, 1 << 20, 0) == bytes(100) + data[:, 8:].tobytes()
    finally:
        os.close(fd)


def test_pwritev_says_what_is_wrong() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        iovec.pwritev(-1, iovec.rows(np.zeros((1, 5), dtype=np.uint8)), 0)


def send_all(sock: socket.socket, iov: iovec.Iovecs) -> int:
    """Send everything; return the number of calls."""
    calls = 0
    while len(iov):
        calls += 1
        try:
            iov = iovec.rest(iov, iovec.send_some(sock.fileno(), iov))
        except BlockingIOError:
            select.select([], [sock], [])
    return calls


@pytest.mark.parametrize("blocking", [True, False])
def test_sending_is_whole_against_a_slow_reader(blocking: bool) -> None:
    left, right = socket.socketpair()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    left.setblocking(blocking)
    rng = np.random.default_rng(2)
    arrays = [rng.integers(0, 256, int(length), dtype=np.uint8) for length in rng.integers(0, 3000, 2500)]
    got = bytearray()
    reader = threading.Thread(target=receive, args=(right, got, True))
    reader.start()
    try:
        send_all(left, pieces(*arrays))
    finally:
        left.close()
        reader.join()
        right.close()
    assert bytes(got) == b"".join(array.tobytes() for array in arrays)


def test_more_pieces_than_one_message_takes_go_in_one_call() -> None:
    rng = np.random.default_rng(4)
    arrays = [rng.integers(0, 256, 7, dtype=np.uint8) for _ in range(2 * IOV_MAX + 5)]
    left, right = socket.socketpair()
    with left, right:
        assert send_all(left, pieces(*arrays)) == 1
        assert right.recv(1 << 16, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == b"".join(a.tobytes() for a in arrays)


def test_without_the_kernels_call_each_message_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iovec, "_SENDMMSG", None)
    data = np.arange(2 * IOV_MAX + 5, dtype=np.uint8).reshape(-1, 1)
    left, right = socket.socketpair()
    with left, right:
        assert send_all(left, pieces(*data)) == 3
        assert right.recv(1 << 16) == data.tobytes()


def test_sending_goes_on_after_signals() -> None:
    left, right = socket.socketpair()
    data = np.random.default_rng(3).integers(0, 256, 8 << 20, dtype=np.uint8)
    got, rang = bytearray(), []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    reader = threading.Thread(target=receive, args=(right, got, True))
    reader.start()
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        send_all(left, pieces(data))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        left.close()
        reader.join()
        right.close()
    assert bytes(got) == data.tobytes()
    assert rang


def test_sending_to_a_closed_peer_raises_and_does_not_kill() -> None:
    data = np.zeros(5, dtype=np.uint8)
    left, right = socket.socketpair()
    right.close()
    with left, pytest.raises(BrokenPipeError):
        iovec.send_some(left.fileno(), pieces(data))


def test_receiving_fills_pieces_in_their_order() -> None:
    rooms = [np.zeros(length, dtype=np.uint8) for length in (3, 1, 4096, 8)]
    left, right = socket.socketpair()
    with left, right:
        data = os.urandom(sum(len(room) for room in rooms))
        later = threading.Timer(0.05, left.sendall, (data[5:],))
        left.sendall(data[:5])
        later.start()  # the rest is waited for
        assert iovec.receive_some(right.fileno(), pieces(*rooms)) == len(data)
        assert b"".join(room.tobytes() for room in rooms) == data
        later.join()
        left.sendall(b"ab")
        left.shutdown(socket.SHUT_WR)
        assert iovec.receive_some(right.fileno(), pieces(*rooms)) == 2
        assert iovec.receive_some(right.fileno(), pieces(*rooms)) == 0
    assert rooms[0].tobytes() == b"ab" + data[2:3]


def test_receiving_into_memory_that_is_none_takes_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"word")
        with pytest.raises(OSError, match="Bad address"):
            iovec.receive_some(right.fileno(), np.array([[4096, 4]], dtype=np.uint64))
        assert right.recv(9) == b"word"
