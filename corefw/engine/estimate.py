"""What a precopy migration would be like, from measured rates: arithmetic without a clock or I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST: Final = 0.1
PASSES: Final = 200
"""More passes than a migration that converges needs."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes of pages that a guest dirtied per second: in the first tenth of a second, and in the rest of one. A guest
    that writes the same pages again and again has a small second rate."""

    first: float
    second: float

    def dirtied(self, seconds: float) -> float:
        """Bytes that differ from what they were `seconds` ago."""
        short = self.first * min(seconds, FIRST)
        if seconds <= FIRST:
            return short
        # What was dirtied in the first tenth may well be dirtied again in the rest: the larger of two bounds.
        return max(short, self.second * seconds)


@dataclass(frozen=True, slots=True)
class Estimate:
    """downtime       milliseconds until the destination has the rest, or would have it where it does not converge
    milliseconds   from the start to the end
    pending        bytes that are left when the guest is stopped, or that no further pass makes fewer"""

    converges: bool
    passes: int
    milliseconds: int
    downtime: int
    pending: int


def estimate(ram: int, bandwidth: float, rates: Rates, downtime_limit: int) -> Estimate:
    """`ram` in bytes that have to be sent, `bandwidth` in bytes per second, the limit in milliseconds."""
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
