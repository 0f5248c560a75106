"""Does a larger guest take more time per GiB?"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from bench.engines import Guest
from bench.migrating import Migration, migrate
from bench.results import Bound, Chart, Goal, Of, Outcome, Row, Shape
from bench.sampling import median
from bench.setting import Bench, fits
from bench.warming import GIB, MIB
from corefw.quantities import format_size

NAME: Final = "scaling"
SIZES: Final = (256 * MIB, GIB, 4 * GIB, 8 * GIB)
QUICK_SIZES: Final = (128 * MIB, 256 * MIB, GIB)
TIMES: Final = 3
NOISE: Final = 1.05
"""What counts as no growth: medians of a few runs differ by as much."""


def measure(bench: Bench) -> Outcome:
    sizes = QUICK_SIZES if bench.quick else SIZES
    possible = [ram for ram in sizes if fits(ram)]
    notes = [
        f"Left out: two guests with {format_size(ram)} do not fit into this machine's free memory."
        for ram in sizes
        if ram not in possible
    ]
    runs: dict[int, list[Migration]] = {ram: [] for ram in possible}
    for _ in range(min(TIMES, bench.pairs)):
        for ram in possible:
            found = migrate(bench.ours, Guest(ram))
            runs[ram].append(found)
            bench.say(f"{format_size(ram)}: {found.seconds_per_gib * 1e3:.0f} ms/GiB")
    per_gib = {ram: median(one.seconds_per_gib * 1e3 for one in found) for ram, found in runs.items()}
    rows = [Row(f"time per GiB, {format_size(ram)}", "ms/GiB", value) for ram, value in per_gib.items()]
    rows += [
        Row(
            f"{format_size(large)} against {format_size(small)}, per GiB",
            "times",
            per_gib[large] / per_gib[small],
            goal=Goal(Of.OURS, Bound.AT_MOST, NOISE),
        )
        for small, large in pairwise(possible)
    ]
    points = [(ram / GIB, value) for ram, value in per_gib.items()]
    return Outcome(
        NAME,
        "Scaling: time per GiB by the size of the guest",
        "Paused guests as above; a client's clock; medians. Fixed costs (dialling, set-up, hand-over) weigh on the"
        " small ones. migfw alone: the guest that QEMU runs here is a 32-bit one.",
        rows,
        [Chart("Time per GiB", "GiB of RAM", "ms/GiB", {"migfw": points}, Shape.LINE)],
        notes,
        {format_size(ram): [one.document() for one in found] for ram, found in runs.items()},
    )
