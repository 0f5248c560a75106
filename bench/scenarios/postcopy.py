"""How long does a guest wait for a page in postcopy, and when has all of its RAM arrived?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.engines import Guest
from bench.postcopying import Postcopy, move_in_postcopy
from bench.results import Chart, Outcome, Row, Shape, at_most, at_most_qemu_times, no_more_than_qemu
from bench.sampling import Pairs
from bench.setting import Bench, Effort
from bench.warming import GIB, MIB

NAME: Final = "postcopy"
BURST: Final = 8
"""Pages that the guest touches 200 times a second."""
MEDIAN: Final = 0.3
"""Milliseconds: the goal for the median."""
PROCESSOR: Final = 0.5
"""Goal for the destination's processor time, as a fraction of QEMU's."""
POINTS: Final = 2000
"""Points of a chart, at most."""


def measure(bench: Bench) -> Outcome:
    ram = 256 * MIB if bench.effort is Effort.QUICK else GIB
    guest = Guest(ram, working_set=ram, touches=BURST)
    times = (2 * bench.pairs + 1) // 3  # each has hundreds of page faults
    return outcome(bench.compare(lambda side: move_in_postcopy(side, guest), _describe, times), ram, bench.notes())


def outcome(pairs: Pairs[Postcopy], ram: int, notes: Sequence[str]) -> Outcome:
    """The outcome for guests with `ram` bytes."""
    rows = [
        Row("page fault seen by the guest, p50", "ms", *_pooled(pairs, 50), at_most(MEDIAN)),
        Row("the same, as times QEMU's", "ms", *_pooled(pairs, 50), no_more_than_qemu()),
        Row("page fault seen by the guest, p99", "ms", *_pooled(pairs, 99), no_more_than_qemu()),
        Row("page faults of a run", "", *pairs.median(lambda one: float(len(one.touches)))),
        *_reported(pairs),
        Row(
            "from the switch until everything has arrived",
            "ms",
            *pairs.median(lambda one: one.remaining * 1e3),
            no_more_than_qemu(),
        ),
        Row(
            "processor time of the destination",
            "s",
            *pairs.median(lambda one: one.destination_cpu),
            at_most_qemu_times(PROCESSOR),
        ),
        Row("guest stopped, from event STOP to event RESUME", "ms", *pairs.median(lambda one: one.blackout * 1e3)),
    ]
    series = {"migfw": _course(pairs.ours)} | ({"QEMU": _course(pairs.qemu)} if pairs.qemu else {})
    return Outcome(
        NAME,
        f"Postcopy: {ram // MIB} MiB, switched at once, {200 * BURST} pages touched a second all over the RAM",
        "migrate-start-postcopy follows migrate, so the guest runs on the destination while nearly all RAM is sent,"
        " with no limit of bandwidth. Both guests touch the same pages in the same order (bench/touching.py and, under"
        " TCG, bench/guest.asm) and time each touch themselves; those that waited are counted, of all runs together."
        " QEMU has postcopy-preempt. Processor time is the engine's, from before the migration on, without its guest.",
        rows,
        [Chart("Page faults seen by the guest, all runs", "ms since the first", "ms", series, Shape.SCATTER)],
        notes,
        {
            "migfw": [one.document() for one in pairs.ours],
            "QEMU": [one.document() for one in pairs.qemu],
        },
    )


def _pooled(pairs: Pairs[Postcopy], percent: float) -> tuple[float, float | None, float | None]:
    """A percentile in milliseconds over the faults of all runs: ours, QEMU's, and their ratio."""
    ours, theirs = _percentile(pairs.ours, percent), _percentile(pairs.qemu, percent)
    return ours or 0.0, theirs, ours / theirs if ours is not None and theirs else None


def _percentile(runs: Sequence[Postcopy], percent: float) -> float | None:
    waited = np.concatenate([one.touches[:, 1] for one in runs]) if runs else np.empty(0)
    return float(np.percentile(waited, percent)) * 1e3 if len(waited) else None


def _reported(pairs: Pairs[Postcopy]) -> list[Row]:
    """Percentiles from postcopy-latency-dist; QEMU has it since 10.1."""
    if not all(sum(one.reported) for one in (*pairs.ours, *pairs.qemu)):
        return []
    rows = []
    for percent in (50, 99):
        ours, theirs = _bucket(pairs.ours, percent), _bucket(pairs.qemu, percent) if pairs.qemu else None
        ratio = ours / theirs if theirs else None
        rows.append(Row(f"page fault as the destination reports it, p{percent}", "ms", ours, theirs, ratio))
    return rows


def _bucket(runs: Sequence[Postcopy], percent: float) -> float:
    """The percentile in milliseconds of counts by powers of two of a microsecond: the middle of its bucket."""
    counts = np.sum([one.reported for one in runs], axis=0)
    found = int(np.searchsorted(np.cumsum(counts), counts.sum() * percent / 100))
    return float(1.5 * 2**found / 1e3)


def _course(runs: Sequence[Postcopy]) -> list[tuple[float, float]]:
    touches: NDArray[np.float64] = np.concatenate([one.touches for one in runs]) * 1e3
    return [(float(when), float(waited)) for when, waited in touches[:: max(1, -(-len(touches) // POINTS))]]


def _describe(found: Postcopy) -> str:
    return (
        f"{len(found.touches)} faults, p50 {found.latency(50) * 1e3:.2f} ms, p99 {found.latency(99) * 1e3:.2f} ms;"
        f" all there after {found.remaining * 1e3:.0f} ms"
    )
