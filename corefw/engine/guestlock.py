"""The lock under which the guest is started, stopped or asked.

Hold it from reading the guest's run state until you have acted on it. Events that happen meanwhile are delivered when
it is released.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final

POLL: Final = 0.1
"""Seconds after which somebody who waits for his turn looks whether there is still a point in it."""


class GuestLock:
    """Re-entrant. `after` is called when the outermost holder has let go."""

    def __init__(self, after: Callable[[], None]) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._holder: int | None = None
        self._after = after

    def mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._entered()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    @contextmanager
    def unless(self, check: Callable[[], None]) -> Iterator[None]:
        """Hold it; while others do (a guest that verifies itself may take minutes), raise what `check` raises."""
        while not self._lock.acquire(timeout=POLL):
            check()
        self._entered()
        try:
            yield
        finally:
            self._leave()

    def _entered(self) -> None:
        self._depth += 1
        self._holder = threading.get_ident()

    def _leave(self) -> None:
        self._depth -= 1
        outermost = self._depth == 0
        if outermost:
            self._holder = None
        self._lock.release()
        if outermost:
            self._after()
