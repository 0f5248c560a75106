"""What every scenario gets: the two sides, how often to measure, and where to say what happens.

The law: a scenario asks `fits` before it uses memory, and leaves a note where something was left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from bench.engines import Ours, Qemu, Side
from bench.sampling import Pairs, in_turns
from bench.warming import GIB, SPARE, available

T = TypeVar("T")

RETURN_SECONDS: Final = 10.0
"""How long memory of processes that have ended is waited for."""


@dataclass(frozen=True, slots=True)
class Bench:
    """`pairs` of measured runs; `quick` asks for small sizes; `qemu` is None where it is not measured, and `lacking`
    says why; `say` tells the user what happens."""

    pairs: int
    quick: bool
    ours: Ours
    qemu: Qemu | None
    lacking: str
    say: Callable[[str], None]

    def compare(self, run: Callable[[Side], T], describe: Callable[[T], str], times: int | None = None) -> Pairs[T]:
        """`run` on either side in turns, `times` pairs. `describe` a run in a few words."""
        count = 0

        def told(side: Side) -> T:
            nonlocal count
            found = run(side)
            count += 1
            self.say(f"{count:3} {side.name:5} {describe(found)}")
            return found

        other = self.qemu
        return in_turns(times or self.pairs, lambda: told(self.ours), None if other is None else lambda: told(other))

    def notes(self) -> list[str]:
        """What a reader of any comparison has to know."""
        return [f"QEMU was not measured: {self.lacking}."] if self.lacking else []


def fits(ram: int) -> bool:
    """Whether a source and a destination with this much RAM each can be had. What the last run had comes back within
    seconds of its end."""
    end = time.monotonic() + RETURN_SECONDS
    while not (enough := 2 * ram + GIB // 2 < available() - SPARE) and time.monotonic() < end:
        time.sleep(0.1)
    return enough
