"""Forecasts the end of a migration from the passes so far: how long it will take, and whether it converges.

No clock and no I/O. Sizes are bytes of guest state, so a zero page counts as a whole page; times are seconds of any
steady clock. docs/decisions/progress.md gives the reasons for the choices made here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from corefw.quantities import format_milliseconds, format_size
from corefw.settings import MAX_DOWNTIME

RECENT: Final = 1.0
"""Seconds over which the speed of sending is measured."""
RATE_PERIOD: Final = 0.1
"""The shortest time between two harvests from which a dirty rate is computed; shorter ones are added up."""
EPOCH: Final = 1.0
"""The shortest time after which two harvests are compared to see whether less is left."""
LONG_EPOCH: Final = 5.0
"""An epoch this long is evidence enough by itself; shorter ones count if there are two in a row."""
STUCK: Final = 0.95
"""An epoch that leaves more than this share of what was left before made no progress."""
PROGRESS: Final = 0.9
"""An epoch that leaves at most this share made progress; two in a row show that the migration converges after all."""
SAMPLE: Final = 0.2
"""Seconds after which a stuck migration harvests again within a pass: a long pass finds each page only once."""
SAMPLE_EVERY: Final = 5.0
"""The shortest time between two samples: what they find has to be sent again."""
SAMPLE_PASSES: Final = 3
"""Passes from one sample to the next: a pass with a sample ends with less left than others, and is not judged."""
ROOM: Final = 1.25
"""The downtime limit that is proposed is this much more than what the last harvest would take."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The forecast at one moment. None means that it is not known.

    send_rate           bytes of guest state that are sent per second
    dirty_rate          bytes that the guest dirties per second, from one harvest to the next
    time_left           seconds until the guest runs on the destination; None too while the migration does not converge
    pass_time_left      seconds until the present pass has been sent
    growth              how many times as large as the last pass the next one will be, at least 1
    expected_downtime   seconds that it takes to send what the last harvest found
    converges           False: passes do not get smaller, and what is left does not fit into the downtime limit
    """

    pass_total: int = 0
    send_rate: float = 0.0
    dirty_rate: float | None = None
    time_left: float | None = None
    pass_time_left: float | None = None
    expected_downtime: float | None = None
    converges: bool | None = None
    growth: float = 1.0

    def advice(self, max_bandwidth: int) -> str | None:
        """Why it does not converge, and what to do; None if there is no need. `max_bandwidth` is the limit in force, 0
        for none."""
        if (what := self.problem()) is None:
            return None
        remedies = []
        if (limit := self._sufficient_limit()) <= MAX_DOWNTIME:
            remedies.append(f"raise downtime-limit to {format_milliseconds(limit).replace('.00', '')}")
        if max_bandwidth and self.send_rate > 0.8 * max_bandwidth:
            remedies.append("max-bandwidth" if remedies else "raise max-bandwidth")
        remedies.append("stop the guest ('migfw stop')")
        return f"will not converge: {what}; {_either(remedies)}"

    def problem(self) -> str | None:
        """Why it does not converge, as a phrase; None if it does, or if that is not known."""
        if self.converges is not False or not self.send_rate:
            return None
        sent = f"{format_size(self.send_rate)}/s"
        dirtied = f"{format_size(self.dirty_rate or 0)}/s"
        if (self.dirty_rate or 0) > self.send_rate / STUCK:
            return f"the guest dirties {dirtied}, the link carries {sent}"
        return f"the guest dirties memory as fast as the link carries it ({sent})"

    def _sufficient_limit(self) -> int:
        """Milliseconds of downtime that the next pass would fit into, rounded up."""
        needed = self.pass_total / self.send_rate * self.growth * ROOM * 1000
        step = 100
        while True:
            for factor in (1, 2, 3, 5):
                if needed <= step * factor:
                    return step * factor
            step *= 10


def _either(choices: list[str]) -> str:
    *first, last = choices
    return f"{', '.join(first)}, or {last}" if first else last


@dataclass(slots=True)
class Forecast:
    """Follows a single migration. Call `note` whenever it has been found out what is left."""

    now: float
    runs: bool = True  # whether the guest runs; one that is stopped dirties nothing
    _left: int = 0
    _pass_total: int = 0
    _settled: int = 0
    _recent: deque[tuple[float, int]] = field(default_factory=deque)
    _harvested_at: float = field(init=False)
    _ran_until: float = field(init=False)
    _harvests: int = 0
    _dirty_rate: float | None = None
    _sampled_rate: float = 0.0
    _sampled_at: float = float("-inf")
    _sampled_pass: int = -SAMPLE_PASSES
    _rate_since: float = field(init=False)
    _rate_bytes: int = 0
    _epoch_since: float = field(init=False)
    _epoch_left: int = 0
    _stuck: int = 0  # epochs in a row
    _moving: int = 0
    _converges: bool | None = None

    def __post_init__(self) -> None:
        self._harvested_at = self._ran_until = self._rate_since = self._epoch_since = self.now
        self._recent.append((self.now, 0))

    def begin(self, now: float, left: int) -> None:
        """The first pass begins, with everything."""
        self.now = self._harvested_at = self._ran_until = self._rate_since = self._epoch_since = now
        self._left = self._pass_total = self._epoch_left = left
        self._recent = deque([(now, 0)])

    def note(self, now: float, left: int, *, settled: int, dirtied: int, harvested: bool, threshold: int) -> None:
        """Since the last call, `settled` bytes were sent and `dirtied` bytes were found; `left` are known to be left.

        harvested   the dirty logs were read, so a new pass begins
        threshold   bytes that fit into the downtime limit
        """
        self.now, self._left = now, left
        if self.runs:
            self._ran_until = now
        self._settled += settled
        self._rate_bytes += dirtied
        self._recent.append((now, self._settled))
        while len(self._recent) > 2 and now - self._recent[1][0] >= RECENT:
            self._recent.popleft()
        if harvested:
            self._harvest(now, left, threshold)

    @property
    def wants_sample(self) -> bool:
        """Whether to read the dirty logs now, in the middle of a pass, to find out how fast the guest writes."""
        return (
            self._converges is False
            and self.runs
            and SAMPLE <= self.now - self._rate_since <= 1.5 * SAMPLE
            and self.now - self._sampled_at >= SAMPLE_EVERY
            and self._harvests - self._sampled_pass >= SAMPLE_PASSES
        )

    def sampled(self) -> None:
        """The dirty logs were read in the middle of a pass, and `note` was called with what they had."""
        self._sampled_rate = self._rate_bytes / (self.now - self._rate_since)
        self._sampled_at = self._harvested_at = self._rate_since = self.now
        self._sampled_pass = self._harvests
        self._rate_bytes = 0

    def _harvest(self, now: float, left: int, threshold: int) -> None:
        self._harvested_at, self._pass_total = now, left
        self._harvests += 1
        if now - self._rate_since >= RATE_PERIOD:
            self._dirty_rate = self._rate_bytes / (now - self._rate_since)
            self._rate_since, self._rate_bytes = now, 0
        self._judge(now, left, threshold)
        if self._converges is not False:
            self._sampled_rate = 0.0

    def _judge(self, now: float, left: int, threshold: int) -> None:
        """Compare with what was left an epoch ago."""
        if left == 0 or left < threshold or not self.runs:
            self._converges, self._stuck = True, 0
        elif now - self._epoch_since < EPOCH:
            return
        elif self._sampled_pass == self._harvests - 1:
            pass
        elif left > STUCK * self._epoch_left:
            self._stuck, self._moving = self._stuck + 1, 0
            if self._stuck > 1 or now - self._epoch_since >= LONG_EPOCH:
                self._converges = False
        elif left <= PROGRESS * self._epoch_left or self._converges is None:
            self._stuck, self._moving = 0, self._moving + 1
            if self._moving > 1 or self._converges is not False:
                self._converges = True
        self._epoch_since, self._epoch_left = now, left

    def outlook(self, threshold: int) -> Outlook:
        """The forecast at the last note; `threshold` bytes fit into the downtime limit."""
        rate = self._send_rate()
        converges = self._converges if self.runs else True
        return Outlook(
            pass_total=self._pass_total,
            send_rate=rate,
            dirty_rate=self._dirty_rate if self._dirty_rate is None else max(self._dirty_rate, self._sampled_rate),
            time_left=self._time_left(rate, threshold) if rate and converges is not False else None,
            pass_time_left=self._left / rate if rate else None,
            expected_downtime=self._pass_total / rate if rate and self._harvests else None,
            converges=converges,
            growth=max(1.0, (self._dirty_rate or 0.0) / rate) if rate else 1.0,
        )

    def _send_rate(self) -> float:
        (since, before), (until, after) = self._recent[0], self._recent[-1]
        return (after - before) / (until - since) if until - since > 0 else 0.0

    def _time_left(self, rate: float, threshold: int) -> float | None:
        """Each pass sends what was dirtied during the one before. The times form a geometric series, and their sum is
        what is left divided by the difference of the two rates."""
        if self._dirty_rate is None or (self.runs and self._dirty_rate >= STUCK * rate):
            return None
        left = self._left + self._dirty_rate * max(0.0, self._ran_until - self._harvested_at)
        if not self.runs:
            return left / rate
        return max(0.0, left - threshold) / (rate - self._dirty_rate) + min(left, threshold) / rate
