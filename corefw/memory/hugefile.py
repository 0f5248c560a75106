"""Files of huge pages: shared memory like a memfd, in pages of 2 MiB.

create() returns a file of the wanted length, or None, and then the caller uses a memfd. It never raises. Code that uses
the memory does not notice the difference.

Why: a memfd has small pages unless the administrator allowed huge ones for all shared memory, which is not the default.
Measured per GiB on Linux 6.18: a first write takes 0.09 s instead of 0.4, a first read through a mapping 0.05 s instead
of 0.15, arming the dirty log 3 ms instead of 23; and a guest that walks through its arrays has fewer TLB misses. NumPy
does the same for the arrays that it allocates.

How: the mount determines the page size of a tmpfs, so the file is in a tmpfs of our own that is mounted nowhere (fsopen
and fsmount of Linux 5.2) and vanishes with the last descriptor. That takes CAP_SYS_ADMIN; an ordinary user has it in a
user namespace, which a short-lived helper process creates. Only pages that the file fills completely are huge.

Huge pages are not used if the administrator switched them off (transparent_hugepage/enabled is "never"), or if the
environment variable MIGFW_HUGE_PAGES is "off".
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

VARIABLE: Final = "MIGFW_HUGE_PAGES"
HUGE: Final = 2 << 20
"""Bytes of a huge page; fstat(2) calls it the block size of a file that has them."""
WORTHWHILE: Final = 16 << 20
"""Bytes from which a file of huge pages is worth the mount."""
HELPER_SECONDS: Final = 5.0
SWITCH: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_CLOEXEC: Final = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_SET_STRING: Final = 1
_CREATE: Final = 6
_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000

OPTIONS: Final = {b"huge": b"within_size", b"size": b"0", b"mode": b"0700"}
"""Mount options of the tmpfs. It has no size limit, like a memfd."""


def create(length: int) -> int | None:
    """A descriptor of a new file of `length` zero bytes, close-on-exec; None if huge pages are not available."""
    if length < WORTHWHILE or (mount := _mount_once()) is None:
        return None
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=mount)
    except OSError as error:
        log.debug("no file of huge pages: %s", error)
        return None
    try:
        os.ftruncate(fd, length)
    except OSError as error:
        os.close(fd)
        log.debug("no file of %d bytes in huge pages: %s", length, error)
        return None
    return fd


def switched_off(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user or the administrator switched huge pages off, or the kernel has none."""
    try:
        return environment.get(VARIABLE) == "off" or "[never]" in SWITCH.read_text()
    except OSError:
        return True


@functools.cache
def _mount_once() -> int | None:
    """The tmpfs, for the life of this process."""
    if switched_off():
        return None
    try:
        return mount()
    except OSError as error:
        log.debug("no huge pages directly: %s", error)
    try:
        return _ask_helper()
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("no huge pages by a user namespace: %s", error)
        return None


def mount() -> int:
    """A descriptor of a tmpfs with huge pages that is mounted nowhere. Raises OSError."""
    context = _call(_FSOPEN, b"tmpfs", _CLOEXEC)
    try:
        for name, value in OPTIONS.items():
            _call(_FSCONFIG, context, _SET_STRING, name, value, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, _NOSUID_NODEV_NOEXEC)
    finally:
        os.close(context)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result: int = _libc.syscall(
        ctypes.c_long(number), *(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


# -- the helper: a process of its own, because a user namespace needs one with a single thread -------------------------


def _ask_helper() -> int:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            subprocess.run(
                [sys.executable, "-I", "-S", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                timeout=HELPER_SECONDS,
                check=True,
            )
        _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise OSError("the helper sent no descriptor")
    return fds[0]


def _help(link: int) -> None:
    """Run in the helper: enter a user namespace with this user only, mount, pass the descriptor back."""
    user, group = os.geteuid(), os.getegid()
    if _libc.unshare(ctypes.c_int(_CLONE_NEWUSER | _CLONE_NEWNS)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    with socket.socket(fileno=link) as sock:
        socket.send_fds(sock, [b"1"], [mount()])


if __name__ == "__main__":
    _help(int(sys.argv[1]))
