"""Notices that a destination is silent where it should not be (parameter x-migfw-liveness).

A sign of life is a message of the return path, or bytes that the destination has taken. One is due while something is
being sent, while an answer is awaited, and after a PING that the source sends now and then. A destination that owes
nothing may be silent for as long as it likes.

Threads: one of its own for each connection.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from corefw.settings import Settings

PARAMETER: Final = "x-migfw-liveness"

LONGEST_INTERVAL: Final = 5.0
"""Seconds between two PINGs, at most."""


def limit_of(settings: Settings) -> float:
    """Seconds of silence after which a connection counts as broken; 0 for none."""
    return float(settings.integer(PARAMETER))


def interval_of(settings: Settings) -> float:
    """Seconds between two PINGs of a source that has nothing else to send."""
    limit = limit_of(settings)
    return min(LONGEST_INTERVAL, limit / 3) if limit else LONGEST_INTERVAL


class Liveness:
    """Watches until close(). Calls `give_up` once, with the reason, from its thread."""

    def __init__(
        self,
        settings: Settings,
        signs: Callable[[], object],
        due: Callable[[], bool],
        give_up: Callable[[str], None],
    ) -> None:
        """`signs()` is another value after each sign of life; `due()`: whether one is due."""
        self._settings = settings
        self._signs = signs
        self._due = due
        self._give_up = give_up
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="liveness", daemon=True).start()

    def close(self) -> None:
        """Idempotent."""
        self._closed.set()

    def _run(self) -> None:
        signs, since = self._signs(), time.monotonic()
        while not self._closed.wait(interval_of(self._settings) / 2):
            now, limit = time.monotonic(), limit_of(self._settings)
            if (latest := self._signs()) != signs or not self._due():
                signs, since = latest, now
            elif 0 < limit <= now - since:
                self._give_up(f"the destination gave no sign of life in {limit:g} s (parameter {PARAMETER})")
                return
