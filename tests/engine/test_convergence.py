from __future__ import annotations

from corefw.engine.convergence import FINISH, FIRST_WINDOW, SHORT, WINDOW, Convergence


def test_the_seed_s_arithmetic() -> None:
    """100 MB in a window of 100 ms, 300 ms allowed: 300 MB fit; 50 MB/s dirtied need 50 ms of a second's dirt."""
    convergence = Convergence(started=10.0, downtime_limit=300, position=0)
    assert convergence.threshold == 0 and convergence.expected_downtime == 300
    convergence.update(10.0 + WINDOW, 100_000_000, 300, 50_000_000)
    assert round(convergence.bandwidth / 1e9, 6) == 1.0
    assert round(convergence.threshold / 3e8, 6) == 1.0
    assert round(convergence.expected_downtime / 50, 1) == 1.0


def test_a_window_is_not_judged_before_it_is_over() -> None:
    convergence = Convergence(0.0, 300, 0)
    convergence.update(WINDOW, 1_000_000, 300, 0)
    before = convergence.bandwidth
    convergence.update(1.5 * WINDOW, 9_000_000, 300, 0)
    assert convergence.bandwidth == before
    convergence.update(2 * WINDOW, 9_000_000, 300, 0)
    assert round(convergence.bandwidth / 8e7, 6) == 1.0


def test_the_first_estimate_comes_early() -> None:
    convergence = Convergence(0.0, 300, 500)
    convergence.update(FIRST_WINDOW / 2, 1_000_500, 300, 0)
    assert convergence.threshold == 0
    convergence.update(FIRST_WINDOW, 1_000_500, 300, 0)
    assert round(convergence.bandwidth / 1e8, 6) == 1.0


def test_a_limit_changed_in_flight_counts_at_once() -> None:
    convergence = Convergence(0.0, 300, 0)
    convergence.update(WINDOW, 10_000_000, 300, 0)
    convergence.update(1.01 * WINDOW, 10_000_000, 600, 0)
    assert convergence.threshold == int(convergence.bandwidth * 0.6)


def test_what_fits() -> None:
    convergence = Convergence(0.0, 1000, 0)
    assert convergence.fits(0) and not convergence.fits(1)
    convergence.update(1.0, 1_000_000, 1000, 0)
    assert convergence.fits(convergence.threshold - 1) and not convergence.fits(convergence.threshold)


def test_what_is_soon_sent() -> None:
    convergence = Convergence(0.0, 300, 0)
    assert not convergence.is_soon_sent(1)
    convergence.update(1.0, 1_000_000, 300, 0)
    assert convergence.is_soon_sent(int(1_000_000 * FINISH) - 1)
    assert not convergence.is_soon_sent(int(1_000_000 * FINISH))
    assert convergence.is_soon_sent(int(1_000_000 * SHORT) + 1)
    assert not convergence.is_soon_sent(int(1_000_000 * SHORT))


def test_a_window_with_next_to_nothing_says_nothing_of_the_downtime() -> None:
    convergence = Convergence(0.0, 300, 0)
    convergence.update(WINDOW, 10_000, 300, 1_000_000)
    assert convergence.expected_downtime == 300
