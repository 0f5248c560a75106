"""What every scenario gets: the two sides, how much to measure, and where to report progress.

A scenario asks `fits` before it uses memory, and leaves a note where something was left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeVar

from bench.engines import Ours, Qemu, Side
from bench.sampling import Pairs, in_turns
from bench.warming import GIB, SPARE, available

T = TypeVar("T")

FREE_SECONDS: Final = 10.0
"""How long to wait for the memory of processes that have ended."""


class Effort(Enum):
    """How long a run may take: a smoke test with small guests, ten minutes, or without a limit."""

    QUICK = "quick"
    USUAL = "usual"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Bench:
    """`pairs` of measured runs; `qemu` is None if it is not measured, and `lacking` says why; `say` reports
    progress to the user."""

    pairs: int
    effort: Effort
    ours: Ours
    qemu: Qemu | None
    lacking: str
    say: Callable[[str], None]

    def compare(self, run: Callable[[Side], T], describe: Callable[[T], str], times: int | None = None) -> Pairs[T]:
        """Call `run` for either side in turns, `times` pairs. `describe` a run in a few words."""
        count = 0

        def measured(side: Side) -> T:
            nonlocal count
            found = run(side)
            count += 1
            self.say(f"{count:3} {side.name:5} {describe(found)}")
            return found

        other = self.qemu
        return in_turns(
            times or self.pairs, lambda: measured(self.ours), None if other is None else lambda: measured(other)
        )

    def notes(self) -> list[str]:
        """What a reader of any comparison needs to know."""
        return [f"QEMU was not measured: {self.lacking}."] if self.lacking else []


def fits(ram: int) -> bool:
    """Whether there is memory for a source and a destination with this much RAM each. What the last run used
    is free within seconds of its end."""
    end = time.monotonic() + FREE_SECONDS
    while not (enough := 2 * ram + GIB // 2 < available() - SPARE) and time.monotonic() < end:
        time.sleep(0.1)
    return enough
