"""Scatter and gather without a Python object for each piece: the iovec array is a NumPy array.

The law: an iovec array has shape (n, 2) and dtype uint64, rows (address, length), and is C-contiguous: the kernel's
`struct iovec` as it is. The functions here finish what they start: a short count or EINTR is gone on with, IOV_MAX is
kept, the interpreter lock is let go inside the system call. Whoever passes an array keeps the memory that it points
at alive.

Raises OSError; translating it is the caller's business, for only the caller knows what the descriptor is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

IOV_MAX: Final = 1024
"""The most pieces that one call takes (UIO_MAXIOV in the kernel)."""

IOVEC_SIZE: Final = 16

Iovecs = NDArray[np.uint64]

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.restype = ctypes.c_ssize_t
_libc.pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_libc.sendmsg.restype = ctypes.c_ssize_t
_libc.sendmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class _MessageHeader(ctypes.Structure):
    """`struct msghdr` of sendmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


def rows(data: NDArray[np.uint8]) -> Iovecs:
    """One piece for each row of a two-dimensional array; rows may lie apart, the bytes of a row may not.

    Rows that lie one behind the other become one piece.
    """
    count, width = data.shape
    assert width == 0 or data.strides[1] == 1, "the bytes of a row have to be contiguous"
    if data.flags.c_contiguous:
        return np.array([[data.ctypes.data, count * width]], dtype=np.uint64)
    iov = np.empty((count, 2), dtype=np.uint64)
    addresses = np.arange(count, dtype=np.int64) * data.strides[0] + data.ctypes.data
    iov[:, 0] = addresses.view(np.uint64)
    iov[:, 1] = width
    return iov


def pwritev(fd: int, iov: Iovecs, offset: int) -> None:
    """Write every piece, one behind the other, from `offset` on."""

    def write(address: int, count: int) -> int:
        return int(_libc.pwritev(fd, address, count, offset))

    iov = _own(iov)
    while len(iov):
        done = _call(write, iov)
        offset += done
        iov = rest(iov, done)


def sendmsg(fd: int, iov: Iovecs, wait: Callable[[], None] | None = None) -> None:
    """Send every piece on a stream socket. Where it would block: `wait()`, or else wait until there is room."""
    iov = _own(iov)
    while len(iov):
        try:
            iov = rest(iov, send_some(fd, iov))
        except BlockingIOError:
            (wait or _wait_writable(fd))()


def send_some(fd: int, iov: Iovecs) -> int:
    """One sendmsg(2): the bytes that went out. Raises BlockingIOError on a non-blocking socket without room."""

    def send(address: int, count: int) -> int:
        header = _MessageHeader(iov=address, iov_length=count)
        return int(_libc.sendmsg(fd, ctypes.addressof(header), socket.MSG_NOSIGNAL))

    return _call(send, iov)


def _own(iov: Iovecs) -> Iovecs:
    assert iov.dtype == np.uint64 and iov.ndim == 2 and iov.shape[1] == 2
    return np.ascontiguousarray(iov)


def _call(function: Callable[[int, int], int], iov: Iovecs) -> int:
    """`function(address of the array, number of pieces)` until it is not interrupted."""
    address, count = iov.ctypes.data, min(len(iov), IOV_MAX)
    while True:
        done = function(address, count)
        if done >= 0:
            return done
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def rest(iov: Iovecs, done: int) -> Iovecs:
    """What is left to do when `done` bytes of the first call's pieces are."""
    tried = iov[:IOV_MAX]
    ends = np.cumsum(tried[:, 1])
    if done == int(ends[-1]):
        return iov[IOV_MAX:]
    whole = int(np.searchsorted(ends, done, side="right"))
    left = iov[whole:].copy()
    cut = done - (int(ends[whole - 1]) if whole else 0)
    left[0] += np.array([cut, -cut], dtype=np.int64).view(np.uint64)
    return left


def _wait_writable(fd: int) -> Callable[[], None]:
    def wait() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.poll()

    return wait
