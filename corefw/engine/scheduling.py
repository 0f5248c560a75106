"""How the kernel shares the processor between a migration and the guest that it moves.

The law: only the calling thread, only where nobody chose a policy for it, and never with a privilege; where the kernel
refuses, everything works as before.
"""

from __future__ import annotations

import contextlib
import os


def yield_to_guests() -> None:
    """Be what the kernel calls a batch thread: much to do, and nobody who waits for its next step.

    A guest that wakes up then runs at once, and this thread, when it wakes up for more bytes, interrupts neither the
    guest nor the other end of a migration within one host. What it starts (a guest's own threads) is none. Measured there with two processors, a live guest of 1 GiB:
    464 ms in all instead of 516, medians of six in turns.
    """
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
