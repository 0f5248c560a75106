"""Decides when to stop the guest, with QEMU's arithmetic.

What can be sent within the downtime limit at the bandwidth of the last window is the threshold; the guest is stopped
when what is pending fits under it. No clock and no I/O: the meter measures.

Source: QEMU 10.0, migration_update_counters, migration_iteration_run.
"""

from __future__ import annotations

from typing import Final

from corefw.engine.meter import Meter

FINISH: Final = 0.5
"""Seconds of sending that a guest which might be stopped runs on for."""
SHORT: Final = 0.01
"""Seconds of downtime that are not worth one more pass."""
LEAST_BYTES: Final = 10_000
"""A window with fewer bytes says nothing about the expected downtime."""


class Convergence:
    """The estimate of a single migration, from the meter's bandwidth. Sizes in bytes, limits in milliseconds.

    threshold           bytes that fit into the downtime limit
    expected_downtime   milliseconds
    """

    def __init__(self, meter: Meter, downtime_limit: int) -> None:
        self.threshold = 0
        self.expected_downtime = downtime_limit
        self._meter = meter

    def update(self, downtime_limit: int, dirty_bytes_per_second: int) -> None:
        """Take the meter's window into account if it is over. The limit may have been changed meanwhile."""
        if self._meter.measure() > LEAST_BYTES and dirty_bytes_per_second:
            self.expected_downtime = int(dirty_bytes_per_second / self._meter.bandwidth * 1000)
        self.threshold = int(self._meter.bandwidth * downtime_limit / 1000)

    def fits(self, pending: int) -> bool:
        """Whether the guest may be stopped with this many bytes left."""
        return pending == 0 or pending < self.threshold

    def is_soon_sent(self, pending: int) -> bool:
        """Whether this many bytes are worth sending before the guest is stopped, and not after."""
        return self._meter.bandwidth * SHORT < pending < self._meter.bandwidth * FINISH
