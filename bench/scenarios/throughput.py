"""How fast does a guest that does not run move?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bench.engines import Guest
from bench.migrating import Migration, migrate
from bench.results import Chart, Outcome, Row, Shape, at_least_qemu_times
from bench.setting import Bench, Effort
from bench.warming import GIB, MIB

NAME: Final = "throughput"
BAR: Final = 1.2
"""Goal, as a multiple of QEMU's throughput."""


def measure(bench: Bench) -> Outcome:
    guest = Guest(256 * MIB if bench.effort is Effort.QUICK else GIB)
    pairs = bench.compare(lambda side: migrate(side, guest), _describe)
    rows = [
        Row(
            "throughput, by the engine's own figures",
            "MB/s",
            *pairs.median(lambda one: one.throughput / 1e6),
            at_least_qemu_times(BAR),
        ),
        Row(
            "throughput, by a client's clock",
            "MB/s",
            *pairs.median(lambda one: one.wall_throughput / 1e6),
            at_least_qemu_times(BAR),
        ),
        Row("total time", "ms", *pairs.median(lambda one: one.total * 1e3)),
        Row("set-up time", "ms", *pairs.median(lambda one: one.setup * 1e3)),
        Row("processor time of the source", "s/GiB", *pairs.median(lambda one: one.source_cpu / one.ram * GIB)),
        Row(
            "processor time of the destination", "s/GiB", *pairs.median(lambda one: one.destination_cpu / one.ram * GIB)
        ),
    ]
    series = {"migfw": _points(pairs.ours)} | ({"QEMU": _points(pairs.qemu)} if pairs.qemu else {})
    return Outcome(
        NAME,
        f"Throughput: {guest.ram // MIB} MiB that do not compress, paused guest",
        "tcp over loopback, one channel, no limit of bandwidth, return path on, RAM allocated on"
        " both sides. Throughput is the bytes of"
        " pages that were sent (zero pages are not counted) by the time; the engine's own figure is total-time, the"
        " client's clock runs from the command 'migrate' to the event 'completed'.",
        rows,
        [Chart("Throughput by the client's clock, each run", "pair", "MB/s", series, Shape.DOTS)],
        bench.notes(),
        {
            "migfw": [one.document() for one in pairs.ours],
            "QEMU": [one.document() for one in pairs.qemu],
        },
    )


def _describe(found: Migration) -> str:
    return f"{found.wall_throughput / 1e6:.0f} MB/s"


def _points(runs: Sequence[Migration]) -> list[tuple[float, float]]:
    return [(number, one.wall_throughput / 1e6) for number, one in enumerate(runs, 1)]
