"""When to stop the guest: QEMU's loop constants, as pure functions of time and bytes.

The law: no clock and no I/O in here. Bandwidth is what went out in a window of 100 ms; what can be sent within the
downtime limit at that bandwidth is the threshold; the guest is stopped when what is pending fits under it. Source:
QEMU's migration_update_counters and migration_iteration_run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

WINDOW: Final = 0.1
"""Seconds (QEMU's BUFFER_DELAY)."""
FIRST_WINDOW: Final = 0.01
"""The very first estimate comes this early: a small guest would be through before the first full window, and QEMU
would then stop it without knowing whether the rest fits into the downtime."""
FINISH: Final = 0.5
"""Seconds of sending that a guest which might be stopped runs on for."""
SHORT: Final = 0.01
"""Seconds of downtime that are not worth one more pass."""
LEAST_BYTES: Final = 10_000
"""A window with fewer bytes says nothing about the expected downtime."""


@dataclass(slots=True)
class Convergence:
    """The estimate of one migration. Times in seconds of any steady clock, sizes in bytes; `position` is the stream's.

    bandwidth           bytes per second of the last window
    threshold           bytes that fit into the downtime limit
    expected_downtime   milliseconds
    """

    started: float
    downtime_limit: int
    position: int
    bandwidth: float = 0.0
    threshold: int = 0
    expected_downtime: int = 0
    _window_start: float = field(init=False)
    _window_position: int = field(init=False)

    def __post_init__(self) -> None:
        self._window_start = self.started
        self._window_position = self.position
        self.expected_downtime = self.downtime_limit

    def update(self, now: float, position: int, downtime_limit: int, dirty_bytes_per_second: int) -> None:
        """Take note of the stream's `position` at `now`; the limit (milliseconds) may have been changed in flight."""
        spent = now - self._window_start
        transferred = position - self._window_position
        if spent >= (WINDOW if self.bandwidth else FIRST_WINDOW) and transferred:
            self.bandwidth = transferred / spent
            if dirty_bytes_per_second and transferred > LEAST_BYTES:
                self.expected_downtime = int(dirty_bytes_per_second / self.bandwidth * 1000)
            self._window_start = now
            self._window_position = position
        self.position = position
        self.downtime_limit = downtime_limit
        self.threshold = int(self.bandwidth * downtime_limit / 1000)

    def fits(self, pending: int) -> bool:
        """Whether the guest may be stopped with this many bytes left."""
        return pending == 0 or pending < self.threshold

    def is_soon_sent(self, pending: int) -> bool:
        """Whether this many bytes are worth sending before the guest is stopped, and not after."""
        return self.bandwidth * SHORT < pending < self.bandwidth * FINISH
