"""Measures how long a guest waits for its pages in postcopy (capability postcopy-blocktime).

Measured is what QEMU measures: the time from the fault, as the engine reads it, to the moment when the page is
installed, for faults whose page had to be requested. A machine that has no virtual CPUs counts its threads instead.

Source: QEMU 11.1, mark_postcopy_blocktime_begin and _end (migration/postcopy-ram.c).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corefw.control import BlocktimeReport
from corefw.machine import FaultEvent, FaultSource, FaultStage, GuestMapping, RamBlock

BUCKETS: Final = 24
"""Powers of two in QEMU's histogram of microseconds; the last bucket has everything above, too."""
FINE: Final = 4
"""Bits behind the leading one that a latency keeps in the histogram here: an error of 3 % at most."""
MAX_THREADS: Final = 256
"""Threads that are counted one by one; a program that starts more has the others counted together."""


@dataclass(slots=True)
class _Thread:
    """The faults of one thread of the guest, in nanoseconds."""

    total: int = 0
    faults: int = 0

    def add(self, nanoseconds: int) -> None:
        self.total += nanoseconds
        self.faults += 1

    @property
    def average(self) -> int:
        return self.total // self.faults if self.faults else 0


@dataclass(slots=True)
class _Histogram:
    """Latencies in nanoseconds."""

    count: int = 0
    longest: int = 0
    coarse: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    fine: Counter[int] = field(default_factory=Counter)

    def add(self, nanoseconds: int) -> None:
        self.count += 1
        self.longest = max(self.longest, nanoseconds)
        microseconds = nanoseconds // 1000
        self.coarse[min(BUCKETS, max(1, microseconds.bit_length())) - 1] += 1
        shift = max(0, nanoseconds.bit_length() - FINE - 1)
        self.fine[nanoseconds >> shift << shift] += 1

    def percentile(self, percent: int) -> int:
        """The latency that this share of the faults did not exceed; 0 without faults."""
        rank = -(-self.count * percent // 100)
        for lowest in sorted(self.fine):
            rank -= self.fine[lowest]
            if rank <= 0:
                width = 1 << max(0, lowest.bit_length() - FINE - 1)
                return min(self.longest, lowest + width // 2)
        return 0


_Waiter = tuple[int, str, int]
"""A thread of the guest that is counted by itself: (id, "", 0). Others, by what they wait for: (0, block, page)."""


class _Wait(NamedTuple):
    block: str
    page: int
    since: int


class Blocktime:
    """The measurements of one migration. Every method may be called from any thread.

    `clock` returns nanoseconds.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[_Waiter, _Wait] = {}
        self._threads: dict[int, _Thread] = {}
        self._others = _Thread()
        self._latencies = _Histogram()
        self._all_blocked = 0
        self._all_blocked_since: int | None = None

    def began(self, faults: Mapping[str, NDArray[np.int64]]) -> None:
        """Threads have begun to wait: what FaultSource.poll() returned."""
        now = self._clock()
        with self._lock:
            for block, rows in faults.items():
                for page, thread in rows.tolist():
                    self._begin(now, block, page, thread)

    def _begin(self, now: int, block: str, page: int, thread: int) -> None:
        if thread and thread not in self._threads and len(self._threads) < MAX_THREADS:
            self._threads[thread] = _Thread()
        waiter = (thread, "", 0) if thread in self._threads else (0, block, page)
        before = self._waiting.get(waiter)
        if before is not None and (before.block, before.page) == (block, page):
            return  # it was woken, and has found the page still missing
        if before is not None:  # that page was installed, and ended() is about to say so
            self._end(now, waiter, requested=True)
        self._waiting[waiter] = _Wait(block, page, now)
        self._note_blocked(now)

    def ended(self, block: str, runs: NDArray[np.int64], *, requested: bool) -> None:
        """These pages were installed. Those that were here before the fault do not count (`requested` is False)."""
        if not self._waiting:  # most pages are installed before the guest wants them
            return
        now = self._clock()
        with self._lock:
            for waiter in _among(self._waiting, block, runs):
                self._end(now, waiter, requested=requested)

    def note(self, events: Sequence[FaultEvent]) -> None:
        """What compiled code has seen, with threads as FaultSource.poll() returns them."""
        with self._lock:
            for when, stage, block, page, thread in events:
                if stage is FaultStage.BEGAN:
                    self._begin(when, block, page, thread)
                    continue
                for waiter, wait in list(self._waiting.items()):
                    if (wait.block, wait.page) == (block, page):
                        self._end(max(when, wait.since), waiter, requested=stage is FaultStage.INSTALLED)

    def _end(self, now: int, waiter: _Waiter, *, requested: bool) -> None:
        since = self._waiting.pop(waiter).since
        if requested:
            self._threads.get(waiter[0], self._others).add(now - since)
            self._latencies.add(now - since)
        elif self._all_blocked_since is not None and self._all_blocked_since >= since:
            self._all_blocked_since = None
        self._note_blocked(now)

    def _note_blocked(self, now: int) -> None:
        """Add up the time in which every thread that has waited so far waits."""
        blocked = bool(self._threads) and all((thread, "", 0) in self._waiting for thread in self._threads)
        if blocked and self._all_blocked_since is None:
            self._all_blocked_since = now
        elif not blocked and self._all_blocked_since is not None:
            self._all_blocked += max(0, now - self._all_blocked_since)
            self._all_blocked_since = None

    def report(self) -> BlocktimeReport:
        """The figures at this moment; a thread that still waits is in `waiting` alone."""
        with self._lock:
            threads, latencies = self._threads, self._latencies
            total = sum(thread.total for thread in threads.values()) + self._others.total
            return BlocktimeReport(
                blocktime=self._all_blocked,
                blocktime_of_threads=tuple(thread.total for thread in threads.values()),
                faults=latencies.count,
                waiting=len(self._waiting),
                average=total // latencies.count if latencies.count else 0,
                average_of_threads=tuple(thread.average for thread in threads.values()),
                average_of_others=self._others.average,
                distribution=tuple(latencies.coarse),
                median=latencies.percentile(50),
                p99=latencies.percentile(99),
                longest=latencies.longest,
            )


def _among(waiting: Mapping[_Waiter, _Wait], block: str, runs: NDArray[np.int64]) -> list[_Waiter]:
    """Those who wait for a page in these runs of a block."""
    found = [(waiter, wait.page) for waiter, wait in waiting.items() if wait.block == block]
    if not found or not len(runs):
        return []
    if len(runs) == 1:  # as for most requested pages; NumPy would take longer
        first, end = runs[0].tolist()
        return [waiter for waiter, page in found if first <= page < end]
    pages = np.array([page for _, page in found], dtype=np.int64)
    rows = np.searchsorted(runs[:, 0], pages, side="right") - 1
    inside = (rows >= 0) & (pages < runs[rows, 1])
    return [waiter for (waiter, _), hit in zip(found, inside.tolist(), strict=True) if hit]


class MeasuredFaults(FaultSource):
    """A FaultSource whose faults are measured. What is installed in the thread that polls was not requested: the
    pages were here before the guest asked for them."""

    def __init__(self, source: FaultSource, blocktime: Blocktime) -> None:
        self._source = source
        self._blocktime = blocktime
        self._polling: int | None = None

    def fileno(self) -> int:
        return self._source.fileno()

    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        self._polling = threading.get_ident()
        found = self._source.poll()
        self._blocktime.began(found)
        return found

    def install(self, block: RamBlock, runs: NDArray[np.int64]) -> None:
        self._source.install(block, runs)
        self._blocktime.ended(block.idstr, runs, requested=threading.get_ident() != self._polling)

    def mapping(self, block: RamBlock) -> GuestMapping | None:
        return self._source.mapping(block)

    def own_thread(self, thread: int) -> int:
        return self._source.own_thread(thread)

    def note(self, events: Sequence[FaultEvent]) -> None:
        self._source.note(events)
        self._blocktime.note([event._replace(thread=self.own_thread(event.thread)) for event in events])

    def release(self) -> None:
        self._source.release()

    def close(self) -> None:
        self._source.close()
