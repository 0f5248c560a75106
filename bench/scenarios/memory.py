"""How much memory do the engines need for themselves?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.engines import Guest, Side
from bench.migrating import migrate_between, ready
from bench.results import Chart, Outcome, Row, at_most
from bench.sampling import MemoryWatch
from bench.setting import Bench, Effort, fits
from bench.warming import GIB, MIB
from corefw.quantities import format_size

NAME: Final = "memory"
LIMIT: Final = 96.0
"""MiB."""
SIZES: Final = {Effort.QUICK: (256 * MIB,), Effort.USUAL: (GIB,), Effort.FULL: (GIB, 8 * GIB)}
RATE: Final = 100_000_000


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak memory of both engines in one migration, in bytes; the curves are (seconds, bytes)."""

    source: int
    destination: int
    curves: tuple[Sequence[tuple[float, float]], Sequence[tuple[float, float]]]


def measure(bench: Bench) -> Outcome:
    notes = bench.notes()
    rows: list[Row] = []
    curves: dict[str, Sequence[tuple[float, float]]] = {}
    for ram in SIZES[bench.effort]:
        if not fits(ram):
            notes.append(f"Left out: two guests with {format_size(ram)} do not fit into this machine's free memory.")
            continue
        for guest in (Guest(ram), Guest(ram, RATE)):
            what = f"{format_size(ram)}, {'live' if guest.live else 'paused'}"
            ours = _peaks(bench.ours, guest)
            theirs = _peaks(bench.qemu.with_shared_memory(), guest) if bench.qemu and ram <= GIB else None
            bench.say(f"{what}: source {ours.source / MIB:.0f} MiB, destination {ours.destination / MIB:.0f} MiB")
            rows += _rows(what, ours, theirs)
            if not guest.live:
                curves[f"source {format_size(ram)}"] = _fractions(ours.curves[0])
                curves[f"dest. {format_size(ram)}"] = _fractions(ours.curves[1])
    return Outcome(
        NAME,
        "Memory of the engines",
        "The highest RssAnon of the process during a migration, looked at every 5 ms. Guest RAM is shared memory and"
        " not in there; so that the same holds for QEMU, its guest's RAM is put into a memfd for this (the emulator's"
        " translated code is in its figure).",
        rows,
        [Chart("Anonymous memory in the course of a migration", "part of the migration", "MiB", curves)],
        notes,
        {"MiB": {row.what: {"migfw": row.ours, "QEMU": row.qemu} for row in rows}},
    )


def _peaks(side: Side, guest: Guest) -> Peaks:
    with ready(side, guest) as (source, destination, uri):
        with MemoryWatch((source.pid, destination.pid)) as watch:
            migrate_between(source, destination, uri)
        return Peaks(
            watch.peak(source.pid),
            watch.peak(destination.pid),
            (watch.history[source.pid], watch.history[destination.pid]),
        )


def _rows(what: str, ours: Peaks, theirs: Peaks | None) -> list[Row]:
    found = {
        "source": (ours.source, theirs and theirs.source),
        "destination": (ours.destination, theirs and theirs.destination),
    }
    return [
        Row(
            f"peak of the {end}, {what}",
            "MiB",
            mine / MIB,
            other / MIB if other else None,
            mine / other if other else None,
            at_most(LIMIT),
        )
        for end, (mine, other) in found.items()
    ]


def _fractions(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Scale time to fractions of the whole, so that curves of different guests overlap; at most 200 points."""
    end = curve[-1][0] or 1.0
    step = max(1, len(curve) // 200)
    return [(seconds / end, count / MIB) for seconds, count in curve[::step]]
