"""Page numbers, masks and runs convert into each other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from corefw.memory.runs import bridge, distinct, join, mask_of_runs, no_runs, runs_of_mask, runs_of_pages, widen
from tests.helpers.pages import pages_of

PAGES = st.sets(st.integers(0, 200))


@given(PAGES)
def test_pages_to_runs_and_back(pages: set[int]) -> None:
    numbers = np.array(sorted(pages), dtype=np.int64)
    runs = runs_of_pages(numbers)
    assert pages_of(runs) == sorted(pages)
    assert (runs[1:, 0] > runs[:-1, 1]).all()


@given(st.lists(st.integers(0, 20)))
def test_distinct_pages_are_in_order_and_each_is_there_once(pages: list[int]) -> None:
    assert distinct(np.array(pages, dtype=np.int64)).tolist() == sorted(set(pages))


@given(PAGES, st.integers(0, 5))
def test_masks_to_runs(pages: set[int], first: int) -> None:
    mask = np.zeros(201, dtype=np.bool_)
    mask[list(pages)] = True
    assert pages_of(runs_of_mask(mask, first)) == [page + first for page in sorted(pages)]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20))))
def test_join_keeps_the_pages_and_the_runs_apart(pairs: list[tuple[int, int]]) -> None:
    runs = np.array(sorted((first, first + length) for first, length in pairs), dtype=np.int64).reshape(-1, 2)
    joined = join(runs)
    assert pages_of(joined) == sorted(set(pages_of(runs)))
    assert (joined[1:, 0] > joined[:-1, 1]).all()


@given(PAGES)
def test_runs_to_masks_and_back(pages: set[int]) -> None:
    runs = runs_of_pages(np.array(sorted(pages), dtype=np.int64))
    assert (runs_of_mask(mask_of_runs(runs, 201)) == runs).all()


@given(PAGES, st.integers(1, 30))
def test_bridges_close_the_gaps_that_are_narrow(pages: set[int], gap: int) -> None:
    runs = runs_of_pages(np.array(sorted(pages), dtype=np.int64))
    bridged = bridge(runs, gap)
    assert pages <= set(pages_of(bridged))
    assert set(bridged.ravel()) <= set(runs.ravel()), "each run begins and ends where one did"
    assert (bridged[1:, 0] - bridged[:-1, 1] >= gap).all()
    assert not any(low < first < high + gap for low, high in bridged for first, _ in runs if first > high)


@given(PAGES, st.integers(1, 30))
def test_widened_runs_are_whole_groups(pages: set[int], size: int) -> None:
    widened = widen(runs_of_pages(np.array(sorted(pages), dtype=np.int64)), size)
    groups = {page // size for page in pages}
    assert pages_of(widened) == [page for group in sorted(groups) for page in range(group * size, (group + 1) * size)]


def test_nothing() -> None:
    assert no_runs().shape == (0, 2)
