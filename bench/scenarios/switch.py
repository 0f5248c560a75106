"""How long is a guest stopped at a switch to postcopy, and does that grow with its RAM?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from bench.engines import Guest, Side
from bench.postcopying import Postcopy, move_in_postcopy
from bench.results import Chart, Outcome, Row, at_most, no_more_than_qemu
from bench.sampling import Pairs
from bench.setting import Bench, Effort, fits
from bench.warming import GIB, MIB
from corefw.quantities import format_size

NAME: Final = "switch"
SIZES: Final = {
    Effort.QUICK: (128 * MIB, 256 * MIB),
    Effort.USUAL: (512 * MIB, 4 * GIB),
    Effort.FULL: (512 * MIB, GIB, 2 * GIB, 4 * GIB, 8 * GIB),
}
FILLED: Final = 64 * MIB
"""Bytes that the guest fills. The rest is zero, but still has to be on the source's list."""
BURST: Final = 1
GROWTH: Final = 1.5
"""Growth up to this factor from the smallest guest to the largest does not count: the times are a few milliseconds."""


def measure(bench: Bench) -> Outcome:
    sizes = [ram for ram in SIZES[bench.effort] if fits(ram)]
    notes = bench.notes() + [
        f"Left out: two guests with {format_size(ram)} do not fit into this machine's free memory."
        for ram in SIZES[bench.effort]
        if ram not in sizes
    ]
    times = (bench.pairs + 1) // 3  # each takes long
    return outcome({ram: bench.compare(partial(_move, ram), _describe, times) for ram in sizes}, notes)


def _move(ram: int, side: Side) -> Postcopy:
    return move_in_postcopy(side, Guest(ram, working_set=FILLED, touches=BURST))


def outcome(runs: Mapping[int, Pairs[Postcopy]], notes: Sequence[str]) -> Outcome:
    """The outcome of `runs`, keyed by bytes of RAM."""
    stopped = {ram: pairs.median(lambda one: one.blackout * 1e3) for ram, pairs in runs.items()}
    rows = [
        Row(f"guest stopped, {format_size(ram)}", "ms", *found, no_more_than_qemu()) for ram, found in stopped.items()
    ]
    if len(stopped) > 1:
        least, most = min(stopped), max(stopped)
        grown = [
            there / here if here and there else None for here, there in zip(stopped[least], stopped[most], strict=True)
        ]
        what = f"{format_size(most)} against {format_size(least)}"
        rows.append(Row(what, "times", grown[0] or 0.0, grown[1], goal=at_most(GROWTH)))
    series = {"migfw": [(ram / GIB, ours) for ram, (ours, _, _) in stopped.items()]}
    theirs = [(ram / GIB, qemu) for ram, (_, qemu, _) in stopped.items() if qemu is not None]
    return Outcome(
        NAME,
        "Switch to postcopy: how long the guest stands still, by the size of its RAM",
        f"From the source's event STOP to the destination's RESUME. As above, but the guest fills and touches only"
        f" {FILLED // MIB} MiB; the rest of its RAM is zero, and has to be discarded and sent as well. Medians.",
        rows,
        [Chart("Guest stopped", "GiB of RAM", "ms", series | ({"QEMU": theirs} if theirs else {}))],
        notes,
        {
            format_size(ram): {
                "migfw": [one.document() for one in pairs.ours],
                "QEMU": [one.document() for one in pairs.qemu],
            }
            for ram, pairs in runs.items()
        },
    )


def _describe(found: Postcopy) -> str:
    return f"{found.blackout * 1e3:.1f} ms"
