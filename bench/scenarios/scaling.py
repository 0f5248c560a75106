"""Does a larger guest take more time per GiB?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from bench import bare
from bench.engines import Guest
from bench.migrating import Migration, migrate
from bench.results import Chart, Outcome, Row, Shape, at_most
from bench.sampling import median
from bench.setting import Bench, Effort, fits
from bench.warming import GIB, MIB
from corefw.quantities import format_size

NAME: Final = "scaling"
SIZES: Final = {
    Effort.QUICK: (128 * MIB, 256 * MIB),
    Effort.USUAL: (256 * MIB, GIB, 4 * GIB),
    Effort.FULL: (256 * MIB, GIB, 4 * GIB, 8 * GIB),
}
TIMES: Final = 5
NOISE: Final = 1.05
"""Growth up to this factor does not count: medians of a few runs differ by as much."""


def measure(bench: Bench) -> Outcome:
    sizes = SIZES[bench.effort]
    possible = [ram for ram in sizes if fits(ram)]
    notes = [
        f"Left out: two guests with {format_size(ram)} do not fit into this machine's free memory."
        for ram in sizes
        if ram not in possible
    ]
    runs: dict[int, list[Migration]] = {ram: [] for ram in possible}
    copies: dict[int, list[float]] = {ram: [] for ram in possible}
    for _ in range(min(TIMES, bench.pairs)):
        for ram in possible:
            copies[ram].append(bare.seconds_per_gib(ram))
            runs[ram].append(migrate(bench.ours, Guest(ram)))
            migrated = runs[ram][-1].seconds_per_gib
            bench.say(
                f"{format_size(ram)}: {migrated * 1e3:.0f} ms/GiB, a bare copy {copies[ram][-1] * 1e3:.0f} ms/GiB"
            )
    return outcome(runs, copies, notes)


def outcome(
    runs: Mapping[int, Sequence[Migration]], copies: Mapping[int, Sequence[float]], notes: Sequence[str]
) -> Outcome:
    """The outcome of `runs`, keyed by bytes of RAM, each with the seconds per GiB of a bare copy."""
    spent = {ram: [one.seconds_per_gib * 1e3 for one in found] for ram, found in runs.items()}
    middle = {ram: median(found) for ram, found in spent.items()}
    best = {ram: min(found) for ram, found in spent.items()}
    copied = {ram: median(found) * 1e3 for ram, found in copies.items()}
    rows = [
        Row(f"{what}, {format_size(ram)}", "ms/GiB", value)
        for what, values in (("time per GiB", middle), ("the best of them", best), ("a bare copy", copied))
        for ram, value in values.items()
    ]
    if runs:
        times = {ram: middle[ram] / copied[ram] for ram in runs}
        growths = {"time per GiB": middle, "times a bare copy": times, "the best of them": best}
        least, most = min(runs), max(runs)
        rows += [
            Row(
                f"{what}: {format_size(most)} against {format_size(least)}",
                "times",
                values[most] / values[least],
                goal=None if values is middle else at_most(NOISE),
            )
            for what, values in growths.items()
        ]
    series = {"migfw": middle, "migfw, best": best, "bare copy": copied}
    points = {name: [(ram / GIB, value) for ram, value in found.items()] for name, found in series.items()}
    return Outcome(
        NAME,
        "Scaling: time per GiB by the size of the guest",
        "Paused guests as above; a client's clock; medians. Fixed costs (dialling, set-up, hand-over) weigh on the"
        " small ones. A virtual machine's memory is the slower the more of it is used, so each run has a bare copy"
        " beside it: as many bytes through a socket from memory to memory, and nothing else (bench/bare.py). The host"
        " sometimes stands still for seconds, which hits the large ones most. So two things must not grow: the time"
        " as multiples of a bare copy's, and the best run's. QEMU is not here: its guest is a 32-bit one.",
        rows,
        [Chart("Time per GiB", "GiB of RAM", "ms/GiB", points, Shape.LINE)],
        notes,
        {format_size(ram): {"migfw": [one.document() for one in runs[ram]], "bare": list(copies[ram])} for ram in runs},
    )
