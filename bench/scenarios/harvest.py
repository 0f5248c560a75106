"""How long does it take to read and reset the dirty log?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.engines import BenchError
from bench.results import Chart, Outcome, Row, Shape, at_most
from bench.sampling import median
from bench.setting import Bench, Effort
from bench.warming import GIB, MIB, warm
from corefw.memory import pagemap
from corefw.memory.blocks import MemfdBlock

NAME: Final = "harvest"
LIMIT: Final = 5.0
"""Milliseconds per GiB."""
TIMES: Final = 15
PAGE: Final = 4096
EVERY: Final = {"nothing is dirty": 0, "sparse: one page in 1000 is dirty": 1000}
"""The goal is for a log with few pages in it, as after a pass."""
DENSE: Final = {"one page in 5 is dirty": 5}


def measure(bench: Bench) -> Outcome:
    size = 256 * MIB if bench.effort is Effort.QUICK else 2 * GIB
    samples: dict[str, list[float]] = {}
    with _watched(size) as (block, log):
        for what, every in (EVERY | DENSE).items():
            pages = np.arange(0, len(block.pages), every) if every else np.empty(0, dtype=np.int64)
            samples[what] = [_harvest(block, log, pages) for _ in range(TIMES)]
            bench.say(f"{what}: {median(samples[what]) * 1e3 / (size / GIB):.2f} ms/GiB")
    per_gib = {what: [1e3 * seconds / (size / GIB) for seconds in found] for what, found in samples.items()}
    rows = [
        Row(f"harvest, {what}", "ms/GiB", median(found), goal=at_most(LIMIT) if what in EVERY else None)
        for what, found in per_gib.items()
    ]
    series = {what: list(enumerate(found, 1)) for what, found in per_gib.items()}
    return Outcome(
        NAME,
        "Harvest of the dirty log",
        f"PAGEMAP_SCAN of a mapping of {size // MIB} MiB that is all there; one harvest finds the pages that were"
        f" written since the last one and write-protects them again. Medians of {TIMES}.",
        rows,
        [Chart("Each harvest", "harvest", "ms/GiB", series, Shape.DOTS, {"limit": LIMIT})],
        samples={"ms/GiB": per_gib},
    )


@contextmanager
def _watched(size: int) -> Iterator[tuple[MemfdBlock, pagemap.PagemapLog]]:
    if reason := pagemap.unsupported():
        raise BenchError(f"this kernel has no dirty log to measure: {reason}")
    warm(size)
    with ExitStack() as stack:
        tracker = pagemap.open_tracker()
        stack.callback(tracker.close)
        block = MemfdBlock("bench", size)
        stack.callback(block.close)
        block.pages[:, 0] = 1
        log = pagemap.PagemapLog(tracker, block.pages.ctypes.data, size)
        stack.callback(log.stop)
        log.start()
        yield block, log


def _harvest(block: MemfdBlock, log: pagemap.PagemapLog, pages: NDArray[np.int64]) -> float:
    block.pages[pages, 0] += 1
    began = time.perf_counter()
    runs = log.harvest()
    took = time.perf_counter() - began
    assert int((runs[:, 1] - runs[:, 0]).sum()) == len(pages), "the harvest is not what was written"
    return took
