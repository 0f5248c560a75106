"""Give the benchmark its own loopback network, so that both sides use the same congestion control.

QEMU takes the host's default and migfw picks reno within a host, so on a host whose default is BBR a comparison on the
usual loopback compares two congestion controls. In a network namespace the default is ours to choose, and both sides
use the one that migfw picks. Root makes one directly, an ordinary user within a user namespace; where neither works the
benchmark runs on the host's own loopback, and its facts say so.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

from corefw.net.sockets import UNPACED

CONTROL: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")
LOOPBACK: Final = b"lo"

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_INTERFACE_FLAGS: Final = struct.Struct("16sH14x")


def enter_own_network() -> None:
    """Move this process, which must have a single thread, and its future children into a network namespace with
    nothing but a loopback under reno. Raises OSError where the host does not allow that."""
    if os.geteuid() == 0:
        _unshare(_CLONE_NEWNET)
    else:
        user, group = os.geteuid(), os.getegid()
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    CONTROL.write_text(UNPACED.decode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _INTERFACE_FLAGS.pack(LOOPBACK, 0))
        _, flags = _INTERFACE_FLAGS.unpack(answer)
        fcntl.ioctl(control, _SIOCSIFFLAGS, _INTERFACE_FLAGS.pack(LOOPBACK, flags | _IFF_UP))


def congestion_control() -> str:
    """The default of the network that this process is in."""
    return CONTROL.read_text().strip()


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(ctypes.c_int(flags)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
