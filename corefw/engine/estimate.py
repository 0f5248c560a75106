"""Predicts a precopy migration from measured rates: arithmetic without a clock or I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST: Final = 0.1
"""Seconds of a guest's writes that are measured apart from the rest of a second."""
PASSES: Final = 200
"""More passes than a migration that converges needs."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second that a guest dirtied, counted in whole pages: in the first tenth of a second, and in the rest
    of that second. A guest that writes the same pages again and again has a small second rate."""

    first: float
    second: float

    def dirtied(self, seconds: float) -> float:
        """Bytes of pages that have been written in the last `seconds`."""
        short = self.first * min(seconds, FIRST)
        if seconds <= FIRST:
            return short
        # Both are lower bounds: what was dirtied in the first tenth may be dirtied again in the rest.
        return max(short, self.second * seconds)


@dataclass(frozen=True, slots=True)
class Estimate:
    """How a migration would go.

    converges      whether what is left comes to fit into the downtime limit
    milliseconds   from the start to the end, or to the last pass if it does not converge
    downtime       milliseconds; if it does not converge, what the downtime limit would have to be
    pending        bytes left when the guest is stopped, or that further passes do not reduce
    """

    converges: bool
    passes: int
    milliseconds: int
    downtime: int
    pending: int


def estimate(ram: int, bandwidth: float, rates: Rates, downtime_limit: int) -> Estimate:
    """`ram` is the number of bytes to send, `bandwidth` is in bytes per second, the limit in milliseconds."""
    pending, seconds = float(ram), 0.0
    least, passes = pending, 0
    while passes < PASSES:
        passes += 1
        spent = pending / bandwidth
        seconds += spent
        pending = min(float(ram), rates.dirtied(spent))
        if pending * 1000 <= bandwidth * downtime_limit:
            downtime = pending / bandwidth
            return Estimate(True, passes, round((seconds + downtime) * 1000), round(downtime * 1000), int(pending))
        if pending >= least * 0.99:  # a pass leaves as much as the one before
            break
        least = pending
    return Estimate(False, passes, round(seconds * 1000), int(pending / bandwidth * 1000) + 1, int(pending))
