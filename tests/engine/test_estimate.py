"""Predictions of a migration from measured rates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corefw.engine.estimate import Rates, estimate

MIB = 1 << 20


def test_a_guest_that_does_not_write_takes_one_pass() -> None:
    guess = estimate(100 * MIB, 50 * MIB, Rates(0, 0), 300)
    assert (guess.converges, guess.passes, guess.milliseconds, guess.downtime) == (True, 1, 2000, 0)


def test_half_the_bandwidth_halves_what_is_left_with_each_pass() -> None:
    guess = estimate(1000 * MIB, 100 * MIB, Rates(50 * MIB, 50 * MIB), 1000)
    assert (guess.converges, guess.passes) == (True, 4)
    assert guess.downtime == 625
    assert guess.milliseconds == 19375


def test_a_guest_that_writes_faster_does_not_converge() -> None:
    guess = estimate(1000 * MIB, 100 * MIB, Rates(200 * MIB, 200 * MIB), 300)
    assert not guess.converges
    assert guess.downtime == 10001


def test_a_small_working_set_converges_whatever_its_rate() -> None:
    guess = estimate(1000 * MIB, 1000 * MIB, Rates(10 * MIB / 0.1, 10 * MIB), 300)
    assert guess.converges


@given(
    ram=st.integers(0, 1 << 44),
    bandwidth=st.floats(1, 1e12),
    first=st.floats(0, 1e13),
    second=st.floats(0, 1e13),
    limit=st.integers(0, 2_000_000),
)
def test_it_ends_and_says_what_is_so(ram: int, bandwidth: float, first: float, second: float, limit: int) -> None:
    guess = estimate(ram, bandwidth, Rates(first, second), limit)
    assert 0 <= guess.pending <= ram
    assert guess.downtime >= 0
    if guess.converges:
        assert guess.downtime <= limit + 1
    else:
        # With the limit that is proposed it converges.
        assert estimate(ram, bandwidth, Rates(first, second), guess.downtime + 1).converges
