"""The userfaultfd of Linux: as much of it as the dirty log and postcopy need.

A userfaultfd belongs to the memory of the process that made it, and works from any process that holds it. Any user
may make one with UFFD_USER_MODE_ONLY: it serves the faults of the program itself, and a system call on a missing page
fails with EFAULT. One without that flag has system calls wait as well, and takes a permission.

Source: include/uapi/linux/userfaultfd.h. Raises OSError; the callers know what to do without it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from enum import IntFlag
from struct import Struct
from typing import Final

SYSCALL: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "loongarch64": 282}
"""The number of userfaultfd(2), by os.uname().machine."""

DEVICE: Final = "/dev/userfaultfd"
USER_MODE_ONLY: Final = 1
API: Final = 0xAA

_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
_USERFAULTFD_IOC_NEW: Final = 0xAA00
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_UNREGISTER: Final = 0x8010AA01
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_ZEROPAGE: Final = 0xC020AA04
_UFFDIO_CONTINUE: Final = 0xC020AA07

_ApiArgument: Final = Struct("=QQQ")  # api, features, ioctls
_RegisterArgument: Final = Struct("=QQQQ")  # start, length, mode, ioctls
_RangeArgument: Final = Struct("=QQ")  # start, length
_WriteProtectArgument: Final = Struct("=QQQ")  # start, length, mode
_FillArgument: Final = Struct("=QQQq")  # start, length, mode, bytes filled or a negative errno

_Message: Final = Struct("=B15xQI4x")  # event, address, thread id
_PAGE_FAULT: Final = 0x12

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Feature(IntFlag):
    """What to ask for in the handshake; the kernel refuses what it does not know."""

    MISSING_SHMEM = 1 << 5
    THREAD_ID = 1 << 8
    MINOR_SHMEM = 1 << 10
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    WP_ASYNC = 1 << 15


class Mode(IntFlag):
    """Which faults a registered range reports."""

    MISSING = 1
    WP = 2
    MINOR = 4


def create(features: Feature) -> int:
    """A userfaultfd for this process's memory that serves no faults of system calls (UFFD_USER_MODE_ONLY).

    It is close-on-exec and not blocking, and the handshake is done.
    """
    return _shake_hands(_system_call(_FLAGS | USER_MODE_ONLY), features)


def create_unrestricted(features: Feature) -> int:
    """The same, but it serves the faults of system calls, too.

    Needs CAP_SYS_PTRACE, or the sysctl vm.unprivileged_userfaultfd set to 1, or access to /dev/userfaultfd (Linux 6.1).
    """
    try:
        fd = _system_call(_FLAGS)
    except PermissionError:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fd = fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, _FLAGS)
        finally:
            os.close(device)
    return _shake_hands(fd, features)


def _system_call(flags: int) -> int:
    number = SYSCALL.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of userfaultfd(2) on {os.uname().machine} is not known here")
    fd = int(_libc.syscall(ctypes.c_long(number), ctypes.c_int(flags)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _shake_hands(fd: int, features: Feature) -> int:
    try:
        fcntl.ioctl(fd, _UFFDIO_API, bytearray(_ApiArgument.pack(API, features, 0)), True)
    except OSError:
        os.close(fd)
        raise
    return fd


def register(fd: int, address: int, length: int, mode: Mode) -> None:
    """Have faults in a range of whole pages reported, or answered, as `mode` says. Again with another mode
    replaces it."""
    fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(_RegisterArgument.pack(address, length, mode, 0)), True)


def unregister(fd: int, address: int, length: int) -> None:
    """Undo register(); protections go with it."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, _RangeArgument.pack(address, length))


def write_protect(fd: int, address: int, length: int) -> None:
    """Let the next write to each page of the range be noticed."""
    fcntl.ioctl(fd, _UFFDIO_WRITEPROTECT, bytearray(_WriteProtectArgument.pack(address, length, 1)), True)


def read_faults(fd: int, most: int) -> list[tuple[int, int]]:
    """Up to `most` faults that no call has returned before, as (address, thread id); none is no error. Does not block.

    The thread id is 0 without Feature.THREAD_ID.
    """
    try:
        data = os.read(fd, most * _Message.size)
    except BlockingIOError:
        return []
    messages = _Message.iter_unpack(data)
    return [(address, thread) for event, address, thread in messages if event == _PAGE_FAULT]


def map_existing(fd: int, address: int, length: int) -> int:
    """Map pages that are in the page cache, in a range registered for MINOR, and wake the threads that wait for them.

    The bytes mapped, fewer than `length` where a page is in the way and 0 when the kernel was busy. EEXIST: the first
    page is mapped already; EFAULT: it is in a hole; ESRCH: the process has ended.
    """
    return _fill(_UFFDIO_CONTINUE, fd, address, length)


def map_zeros(fd: int, address: int, length: int) -> int:
    """As map_existing(), for pages in a hole, in a range registered for MISSING. EEXIST: the first one is in none."""
    return _fill(_UFFDIO_ZEROPAGE, fd, address, length)


def _fill(request: int, fd: int, address: int, length: int) -> int:
    argument = bytearray(_FillArgument.pack(address, length, 0, 0))
    try:
        fcntl.ioctl(fd, request, argument, True)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
    return max(0, int(_FillArgument.unpack(argument)[3]))


def wake(fd: int, address: int, length: int) -> None:
    """Have threads that wait for a page in this range check again whether it is mapped."""
    fcntl.ioctl(fd, _UFFDIO_WAKE, _RangeArgument.pack(address, length))
