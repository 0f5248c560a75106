"""Passes file descriptors over a UNIX socket, along with bytes (SCM_RIGHTS)."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Sequence


def send_with_fds(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send all of `data`, and the descriptors with its first byte; they stay the caller's.

    Raises OSError; how much was sent is then unknown.
    """
    sent = socket.send_fds(sock, [data], list(fds)) if fds else 0
    sock.sendall(memoryview(data)[sent:])


def receive_with_fds(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """One receive of up to `size` bytes, with up to `most` descriptors that came with them; b"" at the end.

    The descriptors are the caller's, and not inherited by programs that it starts. The kernel closes those beyond
    `most`. Over other sockets than UNIX ones none can come. Raises OSError.
    """
    if sock.family != socket.AF_UNIX:
        return sock.recv(size), []
    fds = array("i")
    data, ancillary, _, _ = sock.recvmsg(size, socket.CMSG_SPACE(most * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    # The kernel rounds the space up, so that one more may have come than was asked for.
    for fd in fds[most:]:
        os.close(fd)
    return data, list(fds[:most])
