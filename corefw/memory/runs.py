"""Sets of pages as numbers, as a mask, and as runs.

Runs have the shape (n, 2) and dtype int64. Their rows are (first, end), with `end` exclusive, in ascending order and
apart: each end is less than the next first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.int64]


def no_runs() -> Runs:
    return np.empty((0, 2), dtype=np.int64)


def distinct(pages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Page numbers in ascending order, each once.

    np.unique() imports numpy.ma when it is first called, which takes 10 to 40 ms: too long while a guest waits for a
    page or is stopped.
    """
    if len(pages) > 1 and not (pages[1:] > pages[:-1]).all():
        pages = np.sort(pages)
        pages = pages[np.concatenate(([True], pages[1:] > pages[:-1]))]
    return pages


def runs_of_pages(pages: NDArray[np.int64]) -> Runs:
    """Convert ascending page numbers without repetitions to runs."""
    if len(pages) == 0:
        return no_runs()
    last = np.flatnonzero(np.diff(pages) != 1)
    runs = np.empty((len(last) + 1, 2), dtype=np.int64)
    runs[0, 0], runs[-1, 1] = pages[0], pages[-1] + 1
    runs[1:, 0] = pages[last + 1]
    runs[:-1, 1] = pages[last] + 1
    return runs


def runs_of_mask(mask: NDArray[np.bool_], first: int = 0) -> Runs:
    """Convert a mask of the pages from `first` on to runs of those that are set."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)) + first
    return edges.astype(np.int64).reshape(-1, 2)


def mask_of_runs(runs: Runs, count: int) -> NDArray[np.bool_]:
    """Convert runs to a mask of `count` pages."""
    steps = np.zeros(count + 1, dtype=np.int8)  # runs are apart, so no two steps fall on the same page
    steps[runs[:, 0]] = 1
    steps[runs[:, 1]] = -1
    return np.cumsum(steps[:count], dtype=np.int8).view(np.bool_)


def bridge(runs: Runs, gap: int) -> Runs:
    """Merge runs that are less than `gap` pages apart: fewer runs, which cover more."""
    if len(runs) < 2:
        return runs
    wide = np.flatnonzero(runs[1:, 0] - runs[:-1, 1] >= gap)
    bridged = np.empty((len(wide) + 1, 2), dtype=np.int64)
    bridged[0, 0], bridged[-1, 1] = runs[0, 0], runs[-1, 1]
    bridged[1:, 0] = runs[wide + 1, 0]
    bridged[:-1, 1] = runs[wide, 1]
    return bridged


def widen(runs: Runs, size: int) -> Runs:
    """Round runs outward to multiples of `size` pages."""
    return runs if size == 1 else join(np.stack((runs[:, 0] // size, -(-runs[:, 1] // size)), axis=1) * size)


def join(runs: Runs) -> Runs:
    """Merge rows in ascending order that may touch or overlap, so that they are apart."""
    if len(runs) < 2:
        return runs
    assert (runs[1:, 0] >= runs[:-1, 0]).all(), "a run that comes too late would be lost"
    furthest = np.maximum.accumulate(runs[:, 1])
    new = np.concatenate(([True], runs[1:, 0] > furthest[:-1]))
    starts = np.flatnonzero(new)
    joined = np.empty((len(starts), 2), dtype=np.int64)
    joined[:, 0] = runs[starts, 0]
    joined[:, 1] = furthest[np.append(starts[1:], len(runs)) - 1]
    return joined
