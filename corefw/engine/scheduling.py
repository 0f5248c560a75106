"""How the kernel shares the processor between a migration and the guest that it moves.

Only the calling thread changes, only while it moves bytes (a guest that it starts must not inherit the policy), and
only if it has the default policy. No privilege is needed. If the kernel refuses, everything works as before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from corefw.errors import ANYTHING
from corefw.memory.slices import SHORT, USUAL, ask_for_slice

T = TypeVar("T")

QUICK_SWITCH: Final = 0.00005
"""Seconds that a thread may keep the interpreter while another one has a requested page. Python's default, 5 ms, is
longer than the page takes."""

NICER: Final = 5
"""What is added to the nice value of a thread whose work can wait."""


def answer_at_once() -> None:
    """Let the calling thread, which mostly waits and has little to do then, run as soon as there is something: a guest
    waits for it.

    A thread inherits SCHED_BATCH from the one that starts it, and preempts no other when it wakes up. A short slice
    (Linux 6.12) also has it preempt those that have not used up theirs.
    """
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) in (os.SCHED_OTHER, os.SCHED_BATCH):
            _set_policy(os.SCHED_OTHER, SHORT)


def _set_policy(policy: int, time_slice: int = USUAL) -> None:
    """Of the calling thread; `time_slice` in nanoseconds. Raises OSError."""
    os.sched_setscheduler(0, policy, os.sched_param(0))
    ask_for_slice(threading.get_native_id(), time_slice)


@contextlib.contextmanager
def yielding_to_guests() -> Iterator[None]:
    """Run the calling thread as a batch thread (SCHED_BATCH), which has much to do and is in no hurry.

    A guest that wakes up then runs at once, and this thread, when it wakes up for more bytes, preempts neither the
    guest nor the other end of a migration within one host. Measured there with two processors, for a live guest of
    1 GiB: 464 ms in all instead of 516, medians of six runs each, taken in turns.
    """
    changed = False
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            _set_policy(os.SCHED_BATCH)
            changed = True
    try:
        yield
    finally:
        if changed:
            with contextlib.suppress(OSError):
                _set_policy(os.SCHED_OTHER)


def run_behind_requests(work: Callable[[], T]) -> T:
    """Send or load in postcopy what the guest does not wait for yet: do `work` in a thread of its own, and return or
    raise what it does.

    The thread has a lower priority than those that have what the guest does wait for, and they take the interpreter
    from it at once. An unprivileged thread could not get its priority back, nor one that it starts; this one ends.

    Measured with two processors and a background stream at full speed: half of the page faults took 1.2 ms at most
    instead of 3 to 4, since on each side a thread that has a page need not wait until this one's time is over.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICER)
        try:
            with yielding_to_guests(), _quick_switches():
                results.append(work())
        except ANYTHING as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"{threading.current_thread().name}: the rest", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class _Switching:
    """How many threads want quick switches, and the interval before the first of them did: it is the process's."""

    lock: Final = threading.Lock()
    threads = 0
    usual = 0.0


@contextlib.contextmanager
def _quick_switches() -> Iterator[None]:
    with _Switching.lock:
        if _Switching.threads == 0:
            _Switching.usual = sys.getswitchinterval()
            sys.setswitchinterval(min(QUICK_SWITCH, _Switching.usual))
        _Switching.threads += 1
    try:
        yield
    finally:
        with _Switching.lock:
            _Switching.threads -= 1
            if _Switching.threads == 0:
                sys.setswitchinterval(_Switching.usual)
