"""When a paused source dials its destination again by itself (parameter x-migfw-reconnect).

It does after the connection broke, or the process had no file descriptor left, up to a number of times, and less and
less often. It does not if the user has broken it, if something else went wrong, or over a transport that has only one
connection to give.

The attempts are counted anew once pages arrive again, and not when the destination answers: a link may break each time
right after that.

Threads: the migration thread; `report` may be called from any.
"""

from __future__ import annotations

import time
from typing import Final

from corefw.control import ReconnectReport
from corefw.settings import Settings

FIRST_DELAY: Final = 0.2
LONGEST_DELAY: Final = 10.0
"""Seconds before the first attempt; each further one comes after twice as long, up to the second."""


class Reconnection:
    """The attempts of one migration."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._possible = False
        self._attempts = 0
        self._broke = 0.0
        self._arrived = 0

    def broke(self, *, possible: bool) -> None:
        """The migration has paused. `possible`: dialling again may help."""
        self._possible = possible
        self._broke = time.monotonic()

    def succeeded(self, arrived: int) -> None:
        """The destination goes on. `arrived`: how many pages it has."""
        if arrived > self._arrived:
            self.count_anew()
        self._arrived = arrived
        self._possible = False

    def count_anew(self) -> None:
        """No attempt has been made. From any thread."""
        self._attempts = 0

    def begin(self) -> None:
        """One more attempt."""
        self._attempts += 1

    def delay(self) -> float | None:
        """Seconds between the break and the next attempt; None if there is none."""
        limit = self._settings.integer("x-migfw-reconnect")
        if not self._possible or 0 <= limit <= self._attempts:
            return None
        return float(min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self._attempts, 10)))

    def report(self) -> ReconnectReport | None:
        """The attempts so far, if there are further ones; else None."""
        limit = self._settings.integer("x-migfw-reconnect")
        if (delay := self.delay()) is None:
            return None
        wait = max(0.0, self._broke + delay - time.monotonic())
        return ReconnectReport(self._attempts, None if limit < 0 else limit, int(wait * 1000))
