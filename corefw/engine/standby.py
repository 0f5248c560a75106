"""Threads that exist before they have something to do.

A new thread inherits the policy of the one that starts it, and where the processors are busy it may take milliseconds
until it runs for the first time. While a guest stands still, that is too long.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue

from corefw.engine.scheduling import answer_at_once


class StandbyThread:
    """A daemon thread that waits for its work and then runs as soon as it can (answer_at_once). Any thread may call the
    methods, one at a time."""

    def __init__(self, name: str) -> None:
        """Raises RuntimeError if the host has no thread left."""
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._began = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def began(self) -> bool:
        """Whether begin() was called."""
        return self._began

    def begin(self, work: Callable[[], None]) -> None:
        """Have the thread call `work`, which does not raise, and end. At most once, and not after dismiss()."""
        self._began = True
        self._work.put(work)

    def dismiss(self) -> None:
        """End a thread that has not begun, and wait for that. Idempotent; does nothing once it has begun."""
        if not self._began:
            self._work.put(None)
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """After begin(): wait until the work has been done, at most for `seconds`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        answer_at_once()
        work = self._work.get()
        if work is not None:
            work()


class ArrivalThreads:
    """The threads that a guest needs as soon as it arrives in postcopy.

    faults      serves its page faults
    start       starts it
    requested   reads the pages that it waits for, where they have a channel of their own
    """

    def __init__(self) -> None:
        """Raises RuntimeError if the host has no thread left."""
        with contextlib.ExitStack() as made:
            self.faults = _make("page faults", made)
            self.start = _make("guest start", made)
            self.requested = _make("requested pages", made)
            made.pop_all()

    def dismiss(self) -> None:
        """End those that were not needed. Idempotent."""
        for thread in (self.faults, self.start, self.requested):
            thread.dismiss()


def _make(name: str, made: contextlib.ExitStack) -> StandbyThread:
    """A thread that `made` dismisses if it is closed."""
    thread = StandbyThread(name)
    made.callback(thread.dismiss)
    return thread
