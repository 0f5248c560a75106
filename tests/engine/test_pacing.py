from __future__ import annotations

import bisect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.engine.pacing import FREE_LEAST, FREE_START, MOST_BUDGET, STEP, Pacer


class Clock:
    """Time that passes only in sleep: what the pacer would do on a machine that is never late."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, pacer: Pacer, limit: int) -> None:
        while (rest := pacer.rest(limit)) > 0:
            self.now += min(rest, 0.1) + 1e-6


@given(
    limit=st.integers(1 << 20, 1 << 33),
    work=st.lists(st.floats(0, 0.5), min_size=20, max_size=60),
    overshoot=st.integers(0, 8192),
)
@settings(max_examples=60)
def test_no_second_has_more_than_five_percent_too_much(limit: int, work: list[float], overshoot: int) -> None:
    """`work`: how long sending a step takes, as a part of the time that is due for it; now and then it stalls."""
    clock = Clock()
    pacer = Pacer(clock)
    sent: list[tuple[float, int]] = []
    while clock.now < 103.0:
        budget = pacer.budget(limit) + overshoot
        share = work[len(sent) % len(work)]
        clock.now += share * budget / limit if share < 0.49 else 0.2  # a stall, not made up for
        sent.append((clock.now, budget))
        pacer.sent(budget, limit)
        clock.wait(pacer, limit)
    moments = [moment for moment, _ in sent]
    for at, moment in enumerate(moments):
        end = bisect.bisect_left(moments, moment + 1.0)
        assert sum(count for _, count in sent[at:end]) <= 1.05 * limit + overshoot


@given(limit=st.integers(1 << 20, 1 << 28))
@settings(max_examples=40)
def test_every_second_has_what_it_may_have(limit: int) -> None:
    clock = Clock()
    pacer = Pacer(clock)
    total, began = 0, clock.now
    while clock.now < began + 1.0:
        pacer.sent(pacer.budget(limit), limit)
        clock.wait(pacer, limit)
        total += pacer.budget(limit)
    assert 0.95 * limit <= total <= 1.05 * limit


def test_a_limit_may_change_in_flight() -> None:
    clock = Clock()
    pacer = Pacer(clock)
    pacer.sent(1 << 20, 1 << 20)
    clock.wait(pacer, 1 << 20)
    assert 1.0 <= clock.now - 100 < 1.01
    pacer.sent(1 << 20, 0)
    assert pacer.rest(0) == 0
    assert pacer.budget(0) == FREE_START and pacer.budget(100 << 20) == int((100 << 20) * STEP)


@pytest.mark.parametrize(
    ("bandwidth", "budget"), [(1 << 20, FREE_LEAST), (1 << 30, (1 << 30) // 50), (1 << 40, MOST_BUDGET)]
)
def test_a_free_stream_goes_in_steps_of_a_fiftieth_of_a_second(bandwidth: int, budget: int) -> None:
    clock = Clock()
    pacer = Pacer(clock)
    before = pacer.budget(0)
    for _ in range(12):
        count = pacer.budget(0)
        assert count <= 2 * before
        before = count
        clock.now += count / bandwidth
        pacer.sent(count, 0)
    assert pacer.budget(0) == pytest.approx(budget, rel=0.01)
    pacer.sent(40, 0)  # the end of a pass says nothing about the path
    assert pacer.budget(0) == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize(("later", "seconds"), [(0, 1.0), (10 << 20, 1.9), (512 << 10, 10.0)])
def test_a_higher_limit_counts_for_what_is_owed_already_and_a_lower_one_does_not(later: int, seconds: float) -> None:
    """Ten seconds' worth went out; after one of them the limit is none, ten times or half of what it was."""
    clock = Clock()
    pacer = Pacer(clock)
    pacer.sent(10 << 20, 1 << 20)
    clock.now += 1.0
    assert 8.9 < pacer.rest(1 << 20) < 9.1
    clock.wait(pacer, later)
    assert clock.now - 100 == pytest.approx(seconds, abs=0.02)
