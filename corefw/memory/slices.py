"""How much time a thread asks the kernel's scheduler for at once: one that asks for little is given it sooner when it
wakes up (Linux 6.12). It gets no more processor time in all. Older kernels ignore it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from struct import Struct
from typing import Final

SHORT: Final = 100_000
"""Nanoseconds, the least that the kernel takes."""
USUAL: Final = 0
"""What the kernel gives to a thread that asks for nothing."""

_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "loongarch64": 274}.get(os.uname().machine)
_SchedAttr: Final = Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period
_libc: Final = ctypes.CDLL(None)


def ask_for_slice(thread: int, nanoseconds: int) -> None:
    """Let a thread ask for this much, if it is a usual or a batch thread. Does nothing where that is not permitted or
    not possible."""
    with contextlib.suppress(OSError):
        policy = os.sched_getscheduler(thread)
        if _SCHED_SETATTR is None or policy not in (os.SCHED_OTHER, os.SCHED_BATCH):
            return
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        attributes = _SchedAttr.pack(_SchedAttr.size, policy, 0, nice, 0, nanoseconds, 0, 0)
        _libc.syscall(ctypes.c_long(_SCHED_SETATTR), thread, attributes, 0)


def ask_for_slices(process: int, nanoseconds: int) -> None:
    """The same for all threads of a process. Those that they start inherit it."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            ask_for_slice(int(task.name), nanoseconds)
