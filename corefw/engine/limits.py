"""Limits on a whole migration: how long it may take and how many passes, and what happens then.

Parameters of the source: x-migfw-timeout, x-migfw-max-passes, x-migfw-on-timeout. They hold until the guest is stopped
for the switchover, and may be changed while the migration runs. With "cancel" the migration fails and the guest runs on
here; with "switchover" the guest is stopped and the rest is sent, whatever the downtime limit says. If the destination
then takes nothing any more, the migration fails too, and the guest runs on here.

Threads: `watch` runs in one of its own, since a migration that hangs in a connect or a send cannot look at a clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from corefw.errors import MigfwError
from corefw.quantities import format_milliseconds
from corefw.settings import Settings

LOOK: Final = 0.1
"""Seconds between two looks at the clock."""

STALL: Final = 60.0
"""Seconds after which a single send counts as one that will not return: on a very slow link it may take long."""


class Limits:
    """The limits of a single migration.

    reason      the limit that was reached, as a phrase; "" as long as none was
    cancelled   the migration ends because of it
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._stopped = False
        self.reason = ""
        self.cancelled = False

    def guest_stops(self) -> None:
        """The guest is about to be stopped for the switchover: no limit on time or passes holds from here on."""
        with self._lock:
            self._stopped = True

    def end(self) -> None:
        """The guest was handed over, or the migration has ended: nothing is aborted from here on."""
        with self._lock:
            self._over.set()

    def watch(
        self, abort: Callable[[], None], can_switch_over: Callable[[], bool], longest_send: Callable[[], float]
    ) -> None:
        """Call `abort` when the time is up; but not if the guest is to be stopped then, as long as `can_switch_over()`
        and no send hangs. `longest_send` gives the seconds that the longest of the sends under way has taken."""
        while not self._over.wait(LOOK):
            with self._lock:
                if self._over.is_set():
                    return
                reason = self.reason if self._stopped else self._time_is_up()
                if not reason:
                    continue
                if self._stopped or (self._switches_over() and can_switch_over()):
                    if (seconds := longest_send()) < STALL:
                        continue
                    reason += f", and the destination has taken nothing for {seconds:.0f} s"
                self.reason, self.cancelled = reason, True
                abort()
                return

    def reached(self, passes: int = 0) -> bool:
        """Whether the guest is to be stopped now. `passes` were sent, and what is left does not fit. Raises MigfwError
        if the migration is to end instead."""
        reason = self._time_is_up() or self._enough(passes)
        if not reason:
            return False
        self.reason = reason
        if not self._switches_over():
            self.cancelled = True
            raise MigfwError(reason)
        return True

    def _time_is_up(self) -> str:
        timeout = self._settings.integer("x-migfw-timeout")
        if not timeout or (self._clock() - self._started) * 1000 < timeout:
            return ""
        return f"it took longer than {format_milliseconds(timeout)} (x-migfw-timeout)"

    def _enough(self, passes: int) -> str:
        allowed = self._settings.integer("x-migfw-max-passes")
        if not allowed or passes < allowed:
            return ""
        return f"{passes} {'pass was' if passes == 1 else 'passes were'} sent (x-migfw-max-passes)"

    def _switches_over(self) -> bool:
        return self._settings.parameter("x-migfw-on-timeout") == "switchover"
