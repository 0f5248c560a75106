"""How long does it take to move a guest that keeps writing, and how long is it stopped?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bench.engines import Guest
from bench.migrating import Migration, migrate
from bench.results import Chart, Outcome, Row, Shape, at_most, no_more_than_qemu
from bench.setting import Bench, Effort
from bench.warming import GIB, MIB

NAME: Final = "live"
RATE: Final = 100_000_000
LIMIT: Final = 300.0
"""Milliseconds: the default of downtime-limit, on both sides."""
RATE_SECONDS: Final = 3.0


def measure(bench: Bench) -> Outcome:
    guest = Guest(256 * MIB if bench.effort is Effort.QUICK else GIB, RATE)
    sides = [bench.ours, *([bench.qemu] if bench.qemu else [])]
    rates = {side.name: side.measure_rate(guest, RATE_SECONDS) for side in sides}
    pairs = bench.compare(lambda side: migrate(side, guest), _describe)
    worst = max(one.downtime for one in pairs.ours) * 1e3
    theirs = max((one.downtime for one in pairs.qemu), default=None)
    blackouts = all(one.blackout is not None for one in (*pairs.ours, *pairs.qemu))
    rows = [
        Row("total time, by the engine", "ms", *pairs.median(lambda one: one.total * 1e3), no_more_than_qemu()),
        Row("total time, by a client's clock", "ms", *pairs.median(lambda one: one.wall * 1e3), no_more_than_qemu()),
        Row("downtime, by the engine", "ms", *pairs.median(lambda one: one.downtime * 1e3), no_more_than_qemu()),
        *(
            [Row("downtime, from event STOP to event RESUME", "ms", *pairs.median(_blackout), no_more_than_qemu())]
            if blackouts
            else []
        ),
        Row(
            f"worst downtime (limit {LIMIT:.0f} ms)",
            "ms",
            worst,
            None if theirs is None else theirs * 1e3,
            goal=at_most(LIMIT),
        ),
        Row("passes", "", *pairs.median(lambda one: float(one.passes))),
        Row("dirty rate of the guest before the migration", "MB/s", *_rates(rates)),
    ]
    series = {"migfw": _points(pairs.ours)} | ({"QEMU": _points(pairs.qemu)} if pairs.qemu else {})
    return Outcome(
        NAME,
        f"Live: {guest.ram // MIB} MiB, {RATE // 10**6} MB/s dirtied within {guest.working_set // MIB} MiB",
        "As above, with a guest that runs. Both guests touch their pages in 200 bursts a second and sleep in between:"
        " migfw's is the bundled program 'stress', QEMU's is bench/guest.asm under TCG.",
        rows,
        [Chart("Downtime, each run", "pair", "ms", series, Shape.DOTS, {"limit": LIMIT})],
        bench.notes(),
        {
            "dirty rates": rates,
            "migfw": [one.document() for one in pairs.ours],
            "QEMU": [one.document() for one in pairs.qemu],
        },
    )


def _describe(found: Migration) -> str:
    return f"{found.wall * 1e3:.0f} ms, {found.downtime * 1e3:.0f} ms of it down"


def _blackout(one: Migration) -> float:
    assert one.blackout is not None
    return one.blackout * 1e3


def _rates(rates: dict[str, float]) -> tuple[float, float | None]:
    theirs = rates.get("QEMU")
    return rates["migfw"] / 1e6, None if theirs is None else theirs / 1e6


def _points(runs: Sequence[Migration]) -> list[tuple[float, float]]:
    return [(number, one.downtime * 1e3) for number, one in enumerate(runs, 1)]
