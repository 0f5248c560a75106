"""Close sockets so that their last bytes arrive.

Threads: any; a socket whose last bytes are still on their way is closed by a thread of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
import threading
import time
from typing import Final

LINGER: Final = 60.0
"""Seconds that close() goes on, in the background, to read what the peer sends until our last bytes have arrived."""

LINGER_TICK: Final = 0.02
DRAIN: Final = 16 << 20
"""Bytes discarded at a time, more than the kernel buffers for a connection."""


def end_politely(sock: socket.socket, tcp: bool) -> bool:
    """End our direction, and read what the peer has sent: closing a socket with unread bytes resets the connection, and
    our own last bytes would be lost. True if a thread goes on with that and closes the socket itself."""
    try:
        sock.shutdown(socket.SHUT_WR)
        sock.setblocking(False)
        if not tcp or _drain(sock) or _unsent(sock) == 0:
            return False
    except OSError:
        return False
    threading.Thread(target=_linger, args=(sock,), name="migfw-linger", daemon=True).start()
    return True


def close_now(sock: socket.socket) -> None:
    """Shut down and close the socket, whatever is still on its way. Closing alone would not wake a thread that is
    blocked in a receive."""
    with sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)


def _drain(sock: socket.socket) -> bool:
    """Discard received bytes, up to DRAIN: a peer that keeps sending has to notice that the channel is closed. True at
    the end of the stream."""
    scrap = bytearray(65536)
    try:
        for _ in range(DRAIN // len(scrap)):
            if sock.recv_into(scrap) == 0:
                return True
    except BlockingIOError:
        pass
    return False


def _unsent(sock: socket.socket) -> int:
    """Bytes that the peer's kernel has not acknowledged."""
    count = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", count)[0])


def _linger(sock: socket.socket) -> None:
    """Read what the peer sends until our last bytes have arrived, then close the socket."""
    deadline = time.monotonic() + LINGER
    with contextlib.suppress(OSError):
        while not _drain(sock) and _unsent(sock) and time.monotonic() < deadline:
            time.sleep(LINGER_TICK)
    close_now(sock)
