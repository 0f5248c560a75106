"""How much does it cost to start the command?"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from bench.engines import BenchError
from bench.results import Chart, Outcome, Row, Shape, at_most
from bench.sampling import median
from bench.setting import Bench

NAME: Final = "startup"
LIMIT: Final = 150.0
"""Milliseconds of processor time beyond the bare interpreter."""
TIMES: Final = 15


def measure(bench: Bench) -> Outcome:
    command = Path(sys.executable).with_name("migfw")
    if not command.exists():
        raise BenchError(f"there is no 'migfw' beside {Path(sys.executable).name}: install it (make dev)")
    bare: list[float] = []
    ours: list[float] = []
    for _ in range(TIMES):
        bare.append(_processor_milliseconds(sys.executable, "-c", "pass"))
        ours.append(_processor_milliseconds(str(command), "--help"))
    more = [b - a for a, b in zip(bare, ours, strict=True)]
    bench.say(f"migfw --help: {median(more):.0f} ms more than the interpreter")
    return Outcome(
        NAME,
        "Start-up of the command line",
        f"Processor time, user and kernel, of 'migfw --help' and of 'python -c pass' in turns; medians of {TIMES}.",
        [
            Row("migfw --help", "ms", median(ours)),
            Row("the bare interpreter", "ms", median(bare)),
            Row("the difference", "ms", median(more), goal=at_most(LIMIT)),
        ],
        [
            Chart(
                "Each start",
                "start",
                "ms",
                {"migfw --help": list(enumerate(ours, 1)), "python -c pass": list(enumerate(bare, 1))},
                Shape.DOTS,
            )
        ],
        samples={"migfw --help": ours, "python -c pass": bare},
    )


def _processor_milliseconds(program: str, *arguments: str) -> float:
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(program, [program, *arguments], os.environ, file_actions=silent)
    _, status, used = os.wait4(pid, 0)
    if status:
        raise BenchError(f"'{Path(program).name} {' '.join(arguments)}' failed with status {status}")
    return (used.ru_utime + used.ru_stime) * 1e3
