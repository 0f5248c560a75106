"""Scatter and gather without a Python object for each piece: the iovec array is a NumPy array.

An iovec array has shape (n, 2), dtype uint64 and rows (address, length), and is C-contiguous: it is the kernel's
`struct iovec`. These functions keep to IOV_MAX, go on after EINTR, and release the interpreter lock in the system call.
The caller keeps the memory alive, and translates OSError, since only it knows what the descriptor is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.net import IOV_MAX

IOVEC_SIZE: Final = 16

Iovecs = NDArray[np.uint64]

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.restype = ctypes.c_ssize_t
_libc.pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_libc.recvmsg.restype = ctypes.c_ssize_t
_libc.recvmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.sendmsg.restype = ctypes.c_ssize_t
_libc.sendmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long

_SENDMMSG: Final = {"x86_64": ctypes.c_long(307), "aarch64": ctypes.c_long(269)}.get(os.uname().machine)
# struct mmsghdr on 64-bit hosts, a struct msghdr and a length, is eight words; these are not zero.
_MESSAGE_WORDS: Final = 8
_IOV, _IOV_LENGTH = 2, 3
_SENT = 14  # in half words


def rows(data: NDArray[np.uint8]) -> Iovecs:
    """Make one piece of each row of a two-dimensional array, which must be contiguous within its rows.

    Adjacent rows become one piece.
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
    """Write all pieces, one after the other, from `offset` on."""

    def write(address: int, count: int) -> int:
        return int(_libc.pwritev(fd, address, count, offset))

    iov = _own(iov)
    while len(iov):
        done = _call(write, iov)
        offset += done
        iov = rest(iov, done)


def send_some(fd: int, iov: Iovecs) -> int:
    """Send the pieces, less than 2 GiB for each 1024 of them; return the bytes sent. Raises BlockingIOError on a
    non-blocking socket without room.

    One sendmmsg(2) if the system call's number is known: on a stream, messages follow each other as if they were one,
    and the kernel stops at the first that it did not send completely. So the interpreter, which is slow after guest
    pages have filled the processor's cache, runs once for many megabytes. The C library's sendmmsg is not used, because
    it may be a loop that does not stop (musl). Otherwise one sendmsg(2).
    """
    if _SENDMMSG is None:
        iov = iov[:IOV_MAX]
    starts = np.arange(0, len(iov), IOV_MAX)
    messages = np.zeros((len(starts), _MESSAGE_WORDS), dtype=np.uint64)
    messages[:, _IOV] = (starts * IOVEC_SIZE).astype(np.uint64) + np.uint64(iov.ctypes.data)
    messages[:, _IOV_LENGTH] = np.minimum(IOV_MAX, len(iov) - starts)
    if _SENDMMSG is None:
        return _call(lambda address, _: int(_libc.sendmsg(fd, address, socket.MSG_NOSIGNAL)), messages)
    number = _SENDMMSG

    def send(address: int, count: int) -> int:
        return int(_libc.syscall(number, ctypes.c_long(fd), ctypes.c_void_p(address), count, socket.MSG_NOSIGNAL))

    done = _call(send, messages)
    sent = messages.view(np.uint32)[:done, _SENT].astype(np.int64)
    whole = np.add.reduceat(iov[:, 1], starts)[: done - 1]
    if (sent[:-1] != whole.astype(np.int64)).any():
        raise OSError(errno.EPROTO, "sendmmsg went on behind a message that it had not sent whole")
    return int(sent.sum())


def receive_some(fd: int, iov: Iovecs) -> int:
    """Do one recvmsg(2) into at most 1024 pieces; return the bytes received, 0 at the end of the stream. Waits until
    all pieces are full or SO_RCVTIMEO is over; raises BlockingIOError if no byte arrived."""
    message = np.zeros((1, _MESSAGE_WORDS), dtype=np.uint64)
    message[0, _IOV], message[0, _IOV_LENGTH] = iov.ctypes.data, min(len(iov), IOV_MAX)
    return _call(lambda address, _: int(_libc.recvmsg(fd, address, socket.MSG_WAITALL)), message)


def _own(iov: Iovecs) -> Iovecs:
    assert iov.dtype == np.uint64 and iov.ndim == 2 and iov.shape[1] == 2
    return np.ascontiguousarray(iov)


def _call(function: Callable[[int, int], int], array: NDArray[np.uint64]) -> int:
    """Call `function(address of the array, number of rows)`, with 1024 rows at most, again after EINTR."""
    address, count = array.ctypes.data, min(len(array), IOV_MAX)
    while True:
        done = function(address, count)
        if done >= 0:
            return done
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def rest(iov: Iovecs, done: int) -> Iovecs:
    """The pieces without their first `done` bytes."""
    ends = np.cumsum(iov[:, 1])
    whole = int(np.searchsorted(ends, done, side="right"))
    if whole == len(iov) or done == (start := int(ends[whole - 1]) if whole else 0):
        return iov[whole:]
    left = iov[whole:].copy()
    cut = done - start
    left[0] += np.array([cut, -cut], dtype=np.int64).view(np.uint64)
    return left
