"""The dispatcher that makes everything that happens in an engine known to its observers.

Invariant: events are delivered in the order in which they were posted, one at a time and with no lock held. Every
observer has seen an event before any observer sees the next one, even if an observer causes the next one itself. So an
observer may call whatever it likes, and no thread ever waits for an observer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from corefw.errors import ANYTHING

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, at `timestamp` (time.time()). Each kind of event is a subclass."""

    timestamp: float = field(default_factory=time.time)


Observer = Callable[[Event], None]


class EventDispatcher:
    """The events of one engine. Thread-safe.

    `post` may be called under any lock; `deliver` is called once the locks are released. Code that takes a lock around
    calls that deliver wraps it in `hold()`.
    """

    def __init__(self) -> None:
        self._observers: list[Observer] = []
        self._waiting: deque[Event] = deque()
        self._lock = threading.Lock()
        self._delivering = False
        self._held = _Depth()

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call `observer(event)` for every event from now on; the function returned ends that.

        The observer runs in a thread that caused an event. An exception that it raises is logged and goes no further.
        """
        self._observers.append(observer)

        def end() -> None:
            if observer in self._observers:
                self._observers.remove(observer)

        return end

    def post(self, event: Event) -> None:
        """Queue an event for the next deliver()."""
        self._waiting.append(event)

    def publish(self, event: Event) -> None:
        """Post an event and deliver it."""
        self.post(event)
        self.deliver()

    def deliver(self) -> None:
        """Deliver everything that was posted. Returns at once if this thread is in hold(), which delivers at its end,
        or if another thread is delivering, which then delivers this as well."""
        while self._begin():
            try:
                while self._waiting:
                    self._deliver_one(self._waiting.popleft())
            finally:
                self._delivering = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Deliver nothing from this thread during the block; afterwards, everything that was posted. Re-entrant."""
        self._held.depth += 1
        try:
            yield
        finally:
            self._held.depth -= 1
            self.deliver()

    def _begin(self) -> bool:
        if self._held.depth:
            return False
        with self._lock:
            if self._delivering or not self._waiting:
                return False
            self._delivering = True
            return True

    def _deliver_one(self, event: Event) -> None:
        for observer in tuple(self._observers):
            try:
                observer(event)
            except ANYTHING:  # an observer that is cancelled must not end the migration whose thread it runs in
                log.exception("an observer of %s failed", type(event).__name__)


class _Depth(threading.local):
    """How many hold() blocks the thread is in."""

    depth = 0
