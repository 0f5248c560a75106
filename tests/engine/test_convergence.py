from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from corefw.engine.convergence import FINISH, SHORT, Convergence
from corefw.engine.meter import WINDOW, Meter


class World:
    """A meter in virtual time, without a limit, and estimates from it. `limit` is in milliseconds."""

    def __init__(self, limit: int = 300) -> None:
        self.now = 10.0
        settings: Any = SimpleNamespace(integer=lambda _: 0)
        self.meter = Meter(settings, clock=lambda: self.now)
        self.convergence = Convergence(self.meter, limit)
        self.limit = limit

    def window(self, count: int, seconds: float = WINDOW, dirty: int = 0) -> None:
        self.now += seconds
        self.meter.sent(count)
        self.convergence.update(self.limit, dirty)


def test_the_seed_s_arithmetic() -> None:
    """100 MB in a window of 100 ms mean 1 GB/s: 300 MB fit into 300 ms, and 50 MB of dirty pages take 50 ms."""
    world = World()
    assert world.convergence.threshold == 0 and world.convergence.expected_downtime == 300
    world.window(100_000_000, dirty=50_000_000)
    assert round(world.convergence.threshold / 3e8, 6) == 1.0
    assert round(world.convergence.expected_downtime / 50, 1) == 1.0


def test_a_limit_changed_in_flight_counts_at_once() -> None:
    world = World()
    world.window(10_000_000)
    world.limit = 600
    world.window(0, WINDOW / 100)
    assert world.convergence.threshold == int(world.meter.bandwidth * 0.6)


def test_what_fits() -> None:
    world = World(1000)
    fits = world.convergence.fits
    assert fits(0) and not fits(1)
    world.window(1_000_000, 1.0)
    assert fits(world.convergence.threshold - 1) and not fits(world.convergence.threshold)


def test_what_is_soon_sent() -> None:
    world = World()
    is_soon_sent = world.convergence.is_soon_sent
    assert not is_soon_sent(1)
    world.window(1_000_000, 1.0)
    bandwidth = world.meter.bandwidth
    assert is_soon_sent(int(bandwidth * FINISH) - 1)
    assert not is_soon_sent(int(bandwidth * FINISH) + 1)
    assert is_soon_sent(int(bandwidth * SHORT) + 1)
    assert not is_soon_sent(int(bandwidth * SHORT) - 1)


def test_a_window_with_next_to_nothing_says_nothing_of_the_downtime() -> None:
    world = World()
    world.window(10_000, dirty=1_000_000)
    assert world.convergence.expected_downtime == 300
