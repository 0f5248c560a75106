"""The lock under which the guest is started, stopped or asked.

Hold it from reading the guest's run state until you have acted on it. Events that happen meanwhile are delivered when
it is released.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from corefw.dispatch import EventDispatcher

POLL: Final = 0.1
"""Seconds after which a thread that waits for the lock checks whether it still has a reason to."""


class GuestLock:
    """Re-entrant."""

    def __init__(self, events: EventDispatcher) -> None:
        self._events = events
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it during the block."""
        with self._events.hold(), self._lock:
            yield

    @contextmanager
    def unless(self, check: Callable[[], None]) -> Iterator[None]:
        """Hold it during the block. While others hold it (a guest that verifies itself may take minutes), raise
        whatever `check` raises."""
        with self._events.hold():
            while not self._lock.acquire(timeout=POLL):
                check()
            try:
                yield
            finally:
                self._lock.release()
