"""Keeps the stream at max-bandwidth.

The law: over any second, what goes out is within 5 % of the limit. So the stream is paced in steps of a hundredth of a
second, not in the seed's windows of a tenth, which let eleven windows' worth into a second; and time in which nobody
had anything to send is not made up for.

Threads: the migration thread; the limit may change in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from corefw.channel import Interrupt

STEP: Final = 0.01
UNLIMITED_BUDGET: Final = 4 << 20
LEAST_BUDGET: Final = 4096
MOST_DEBT: Final = 0.02
"""Seconds of lateness that may be caught up on; the rest of a stall is forgotten."""


class Pacer:
    """`budget()` before sending, `sent()` after it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = clock()

    def budget(self, limit: int) -> int:
        """How many bytes to send now. `limit` is bytes per second, 0 for none."""
        if not limit:
            return UNLIMITED_BUDGET
        return max(LEAST_BUDGET, min(UNLIMITED_BUDGET, int(limit * STEP)))

    def sent(self, count: int, limit: int, interrupt: Interrupt) -> None:
        """Sleep until `count` more bytes are due. Raises Interrupted."""
        now = self._clock()
        if not limit:
            self._due = now
            return
        self._due = max(self._due, now - MOST_DEBT) + count / limit
        while (rest := self._due - self._clock()) > 0:
            if interrupt.wait(rest):
                interrupt.check()
