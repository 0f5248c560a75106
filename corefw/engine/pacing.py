"""Keeps the stream at max-bandwidth.

The law: over any second, what goes out is within 5 % of the limit. So the stream is paced in steps of a hundredth of a
second, not in QEMU's windows of a tenth, which let eleven windows' worth into a second; and time in which nobody
had anything to send is not made up for. A limit that is raised counts at once, also for what was sent already; one that
is lowered does not: what was sent within the old one would keep the stream silent for longer than that.

Threads: the migration thread. No waiting in here: `rest()` says how long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

STEP: Final = 0.01
LEAST_BUDGET: Final = 4096
MOST_BUDGET: Final = 32 << 20
FREE_STEP: Final = 0.02
"""Seconds that a part is to take where there is no limit: short beside the window of the bandwidth."""
FREE_START: Final = 4 << 20
FREE_LEAST: Final = 64 << 10
MOST_DEBT: Final = 0.02
"""Seconds of lateness that may be caught up on; the rest of a stall is forgotten."""


class Pacer:
    """`budget()` before sending, `sent()` after it, then wait until `rest()` is 0. Limits are bytes a second, 0 for
    none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._limit = 0
        self._ahead = 0.0  # bytes sent that were not due at `_at` yet
        self._free = FREE_START  # what FREE_STEP has room for
        self._asked = self._at

    def budget(self, limit: int) -> int:
        """How many bytes to send now."""
        self._asked = self._clock()
        if not limit:
            return self._free
        return max(LEAST_BUDGET, min(MOST_BUDGET, int(limit * STEP)))

    def sent(self, count: int, limit: int) -> None:
        """`count` more bytes went out."""
        self._go_on(limit)
        self._ahead += count
        if count >= self._free:  # else it ended for want of pages, and says nothing about the path
            # No more than twice as much as before: buffers on the way take the first parts at once.
            spent = max(self._at - self._asked, FREE_STEP / 2)
            self._free = max(FREE_LEAST, min(MOST_BUDGET, int(self._free * FREE_STEP / spent)))

    def rest(self, limit: int) -> float:
        """Seconds until what went out is due."""
        self._go_on(limit)
        return max(0.0, self._ahead / limit) if limit else 0.0

    def _go_on(self, limit: int) -> None:
        """Let the time until now pay for what was sent."""
        now = self._clock()
        if limit < self._limit and self._ahead > 0:
            self._ahead *= limit / self._limit
        self._limit = limit
        paid = (now - self._at) * limit
        self._at = now
        self._ahead = max(-MOST_DEBT * limit, self._ahead - paid) if limit else 0.0
