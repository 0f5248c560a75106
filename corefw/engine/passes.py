"""Sends passes over what is dirty, while the guest runs, until what is left fits into the downtime limit.

QEMU stops the guest as soon as the rest fits into the limit, and so uses up all the downtime that the limit allows.
Here a running guest runs on until the pass has been sent, if that is soon, as long as each pass halves what is left
(docs/decisions/finish-the-pass.md). What is left is the sum over all live savers.

Source: QEMU 10.0, migration_thread, migration_iteration_run. Threads: the migration thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from typing import Final

from corefw.engine.convergence import FINISH, Convergence
from corefw.engine.forecast import Forecast
from corefw.engine.framing import SectionWriter
from corefw.engine.limits import Limits
from corefw.engine.meter import Meter
from corefw.engine.postcopy_start import PostcopyStart
from corefw.engine.statistics import OutgoingStatistics
from corefw.machine import Machine, RunState
from corefw.quantities import format_size
from corefw.section import LiveSaver, Pending
from corefw.settings import Settings
from corefw.wire.stream import StreamWriter

CHEAP: Final = 0.02
"""Seconds that a harvest may take if it only serves to measure the dirty rate. By hashes it may take much longer."""


class _Decision(Enum):
    """STOP the guest, FINISH the pass whatever fits into the downtime limit, or GO_ON and look again."""

    STOP = auto()
    FINISH = auto()
    GO_ON = auto()


class Passes:
    """The passes of a single migration. `check` raises if the migration was cancelled or has failed; `on_pass` is
    called with the number of each pass that begins."""

    def __init__(
        self,
        machine: Machine,
        live: Sequence[LiveSaver],
        settings: Settings,
        statistics: OutgoingStatistics,
        meter: Meter,
        limits: Limits,
        check: Callable[[], None],
        on_pass: Callable[[int], None],
        postcopy: PostcopyStart,
    ) -> None:
        self._machine = machine
        self._live = live
        self._settings = settings
        self._statistics = statistics
        self._meter = meter
        self._limits = limits
        self._check = check
        self._on_pass = on_pass
        self._postcopy = postcopy
        self._clock = meter.clock
        self._forecast = Forecast(self._clock())
        self._harvest_time = 0.0  # seconds that the last harvest took
        self._samples = 0  # harvests that began no pass
        self._dirtied = 0  # what the RAM's harvests had found when last looked at
        self._worth_finishing: float = math.inf  # bytes that may be left of a pass that is sent to its end

    def run(self, writer: StreamWriter, sections: SectionWriter) -> None:
        """Send passes until the guest is to be stopped. Raises what `check` and the savers raise, ChannelError."""
        self._meter.start_window()
        convergence = Convergence(self._meter, self._settings.integer("downtime-limit"))
        self._begin_forecast()
        self._worth_finishing = math.inf
        finishing = False
        while True:
            self._check()
            if self._limits.reached():
                self._warn_of_limit()
                return
            if self._switches_to_postcopy(convergence):
                return
            if self._forecast.wants_sample and self._harvest_time < CHEAP:
                self._sample(convergence)
            if not finishing:
                decision = self._decide(convergence)
                if decision is _Decision.STOP:
                    return
                finishing = decision is _Decision.FINISH
            with self._meter.step() as budget:
                through = self._send_parts(writer, sections, budget)
            self._count(convergence)
            finishing = finishing and not through and self._is_still_soon_sent(convergence)

    def _switches_to_postcopy(self, convergence: Convergence) -> bool:
        """Whether to hand the guest over now, and send the rest of its RAM afterwards."""
        passes = max(0, self._statistics.ram.dirty_sync_count - self._samples - 1)
        if not self._postcopy.decide(passes, self._statistics.outlook):
            return False
        return convergence.fits(self._needed_first())

    def _decide(self, convergence: Convergence) -> _Decision:
        """Look at what is left, and harvest if that fits into the downtime limit."""
        left = self._estimate(convergence)
        if self._is_worth_finishing(convergence, left):
            return self._finish(left)
        if convergence.fits(left):
            sent = self._statistics.ram.dirty_sync_count - self._samples
            left = self._harvest(convergence)
            if not convergence.fits(left) and self._limits.reached(sent):
                self._warn_of_limit()
                return _Decision.STOP
        if not convergence.fits(left):
            self._worth_finishing = math.inf
        if self._is_worth_finishing(convergence, left):
            return self._finish(left)
        return _Decision.STOP if convergence.fits(left) else _Decision.GO_ON

    def _finish(self, left: int) -> _Decision:
        """Send the rest of the pass; another one is worth that if it has at most half as much."""
        self._worth_finishing = left / 2
        return _Decision.FINISH

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Call `on_pass` if the dirty log is harvested in this block, for then a pass begins."""
        passes = self._statistics.ram.dirty_sync_count
        yield
        if self._statistics.ram.dirty_sync_count != passes:
            self._on_pass(self._statistics.ram.dirty_sync_count)

    def _needed_first(self) -> int:
        """Bytes that have to be there before the guest starts on the destination."""
        return sum(saver.pending_estimate().must_precopy for saver in self._live)

    def _begin_forecast(self) -> None:
        for saver in self._live:
            self._statistics.section(saver.key).begin(saver.pending_estimate().total)
        self._dirtied = self._statistics.ram.dirtied
        self._forecast.begin(self._clock(), self._statistics.remaining)

    def _sample(self, convergence: Convergence) -> None:
        """Harvest in the middle of a pass, to measure the dirty rate."""
        self._samples += 1
        self._harvest(convergence, begins_pass=False)
        self._forecast.sampled()

    def _estimate(self, convergence: Convergence) -> int:
        """Bytes known to be left."""
        return self._note(convergence, [saver.pending_estimate() for saver in self._live], harvested=False)

    def _harvest(self, convergence: Convergence, *, begins_pass: bool = True) -> int:
        """Bytes left after a harvest of all dirty logs."""
        began = self._clock()
        with self.reporting():
            left = [saver.pending_exact() for saver in self._live]
        self._harvest_time = self._clock() - began
        return self._note(convergence, left, harvested=begins_pass)

    def _note(self, convergence: Convergence, left_of_each: list[Pending], *, harvested: bool) -> int:
        """Take note of what is left of each section; the sum. `harvested`: it begins a pass."""
        changes = [
            self._statistics.section(saver.key).update(left.total)
            for saver, left in zip(self._live, left_of_each, strict=True)
        ]
        settled = sum(-change for change in changes if change < 0)
        grown = sum(change for change in changes if change > 0)
        ram = self._statistics.ram
        found = (ram.dirtied - self._dirtied) * ram.page_size
        self._dirtied = ram.dirtied
        self._forecast.runs = self._machine.run_state is RunState.RUNNING
        left = self._statistics.remaining
        self._forecast.note(
            self._clock(),
            left,
            settled=settled,
            dirtied=max(grown, found),  # pages that were dirty already are found again, and are nothing more to send
            harvested=harvested,
            threshold=convergence.threshold,
        )
        return left

    def _warn_of_limit(self) -> None:
        """A limit on the migration has decided that the guest is stopped, whatever is left."""
        left = self._statistics.remaining
        self._statistics.warnings.append(
            f"{self._limits.reason}, so the guest was stopped with {format_size(left)} left to send"
        )

    def _is_worth_finishing(self, convergence: Convergence, left: int) -> bool:
        running = self._machine.run_state is RunState.RUNNING
        return running and left <= self._worth_finishing and convergence.is_soon_sent(left)

    def _is_still_soon_sent(self, convergence: Convergence) -> bool:
        """Whether a pass is still worth finishing: max-bandwidth may have been lowered meanwhile."""
        return self._estimate(convergence) < self._meter.bandwidth * FINISH

    def _send_parts(self, writer: StreamWriter, sections: SectionWriter, budget: int) -> bool:
        """Write one PART of each saver, with `budget` bytes for all of them; a saver has its turn only once those
        before it have nothing left. Returns whether nothing is known to be left."""
        end = self._meter.total + budget
        for saver in self._live:
            rest = max(1, end - self._meter.total)
            through = sections.part(saver, partial(saver.iterate, writer, rest))
            writer.flush()
            if not through:
                return False
        return True

    def _count(self, convergence: Convergence) -> None:
        ram = self._statistics.ram
        convergence.update(self._settings.integer("downtime-limit"), ram.dirty_pages_rate * ram.page_size)
        outlook = self._forecast.outlook(convergence.threshold)
        self._statistics.update(convergence.expected_downtime, outlook, self._meter.limit)
