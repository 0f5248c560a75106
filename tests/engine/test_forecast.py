"""Forecasts of a migration, in virtual time: a link of a given bandwidth and a guest of a given dirty rate."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from corefw.engine.forecast import Outlook
from corefw.engine.meter import Meter
from corefw.engine.statistics import OutgoingStatistics
from corefw.errors import MigfwError
from corefw.settings import Settings
from corefw.states import MigrationStatus
from tests.engine.test_passes import GIB, MIB, NeverEnds, World


def watched(world: World) -> World:
    """Run passes until the guest would be stopped, or for a minute."""
    with contextlib.suppress(NeverEnds):
        world.downtime()
    return world


def verdicts(world: World) -> list[bool | None]:
    """The verdicts on convergence, without repetitions."""
    said: list[bool | None] = []
    for _, outlook, _ in world.looks:
        if said[-1:] != [outlook.converges]:
            said.append(outlook.converges)
    return said


def test_nothing_is_forecast_before_anything_was_measured() -> None:
    world = watched(World(4 * GIB, rate=100 * MIB))
    first_pass = [outlook for at, outlook, _ in world.looks if at < 2]
    assert all(
        (outlook.time_left, outlook.expected_downtime, outlook.dirty_rate, outlook.converges) == (None,) * 4
        for outlook in first_pass
    )
    (at, outlook) = next((at, outlook) for at, outlook, _ in world.looks if at > 1)
    assert outlook.pass_time_left == pytest.approx(2 - at, rel=0.1), "but how long the first copy takes is known"


def test_the_time_that_is_left_counts_what_the_guest_dirties_meanwhile() -> None:
    """With a link of 500 MiB/s and 300 MiB/s of writes the progress is 200 MiB/s, not 500."""
    world = watched(World(4 * GIB, rate=300 * MIB, working_set=4 * GIB, bandwidth=500 * MIB))
    for at, outlook, advice in world.looks:
        if at > 9 and world.now - at > 1:
            assert outlook.time_left == pytest.approx(world.now - at, rel=0.2), f"at {at}"
            assert outlook.dirty_rate == pytest.approx(300 * MIB, rel=0.01)
            assert advice is None
    assert verdicts(world) == [None, True]


@pytest.mark.parametrize("working_set", [4 * GIB, 256 * MIB])
def test_a_stuck_migration_measures_how_fast_the_guest_really_writes(working_set: int) -> None:
    """A pass finds each page only once, so its harvest is never larger than the working set."""
    world = watched(World(4 * GIB, rate=800 * MIB, working_set=working_set, bandwidth=500 * MIB))
    _, outlook, advice = world.looks[-1]
    assert outlook.dirty_rate == pytest.approx(800 * MIB, rel=0.1)
    assert advice
    assert "the guest dirties 800.0 MiB/s, the link carries 500.0 MiB/s" in advice


@pytest.mark.parametrize(
    ("ram", "rate", "working_set"),
    [(4 * GIB, 800 * MIB, 4 * GIB), (GIB, 800 * MIB, 256 * MIB), (4 * GIB, 490 * MIB, 4 * GIB)],
    ids=["all of its RAM", "a working set", "hardly less than the link carries"],
)
def test_a_migration_that_does_not_converge_says_so(ram: int, rate: int, working_set: int) -> None:
    world = watched(World(ram, rate=rate, working_set=working_set, bandwidth=500 * MIB))
    at, outlook, advice = next(look for look in world.looks if look[1].converges is False)
    assert at < 15
    assert outlook.time_left is None
    assert advice
    assert advice.startswith("will not converge: the guest dirties ")
    assert "raise downtime-limit to " in advice
    assert "max-bandwidth" not in advice, "there is no such limit"
    assert verdicts(world)[-1] is False, "and it stays said"


def test_the_limit_that_is_proposed_is_enough() -> None:
    world = World(GIB, rate=800 * MIB, working_set=256 * MIB, bandwidth=500 * MIB)
    said: list[str] = []

    def limit() -> int:
        if advice := world.statistics.advice:
            said.append(advice)
        return 1000 if said else 300

    world.limit = limit
    assert world.downtime() < 1
    assert "raise downtime-limit to 1 s" in said[0]


def test_a_guest_that_is_stopped_converges() -> None:
    world = World(4 * GIB, rate=800 * MIB, working_set=4 * GIB, bandwidth=500 * MIB)
    world.ends_at = 20
    watched(world)
    assert world.now < 31
    assert verdicts(world) == [None, False, True]
    at, outlook, advice = next(look for look in world.looks if look[0] > 21)
    assert advice is None
    assert outlook.time_left == pytest.approx(world.now - at, rel=0.4), "what it wrote last is a guess"


def test_the_verdict_does_not_flicker() -> None:
    """The dirty rate goes up and down every second around what the link carries."""

    class Unsteady(World):
        def harvest(self) -> None:
            self.rate = 560 * MIB if int(self.now * 0.7) % 2 else 440 * MIB
            super().harvest()

    world = watched(Unsteady(2 * GIB, rate=500 * MIB, working_set=GIB, bandwidth=500 * MIB))
    assert len(verdicts(world)) <= 4


def test_what_to_do() -> None:
    stuck = Outlook(pass_total=600 * MIB, send_rate=500 * MIB, dirty_rate=800 * MIB, converges=False, growth=1.6)
    assert stuck.advice(0) == (
        "will not converge: the guest dirties 800.0 MiB/s, the link carries 500.0 MiB/s; raise downtime-limit to 3 s,"
        " or stop the guest ('migfw stop')"
    )
    assert "raise downtime-limit to 3 s, max-bandwidth, or stop" in (stuck.advice(500 * MIB) or "")
    far_too_slow = Outlook(pass_total=1 << 45, send_rate=MIB, dirty_rate=2 * MIB, converges=False)
    assert "raise max-bandwidth, or stop the guest" in (far_too_slow.advice(MIB) or "")
    assert "downtime-limit" not in (far_too_slow.advice(MIB) or "")
    assert Outlook(send_rate=1.0, converges=True).advice(0) is None


def test_a_stop_that_will_take_too_long_is_said_while_it_lasts() -> None:
    statistics = OutgoingStatistics(Meter(Settings()), outlook=Outlook(send_rate=100.0 * MIB))
    statistics.ram.remaining_bytes = 20 * MIB
    assert statistics.report(MigrationStatus.ACTIVE).warnings == ()
    statistics.stopped(downtime_limit=300, stop_time=150)
    (warning,) = statistics.report(MigrationStatus.ACTIVE).warnings
    assert "with 20.0 MiB left to send: it will be down for about 350 ms, over the downtime-limit of 300 ms" in warning
    assert statistics.report(MigrationStatus.POSTCOPY_ACTIVE).warnings == (), "the guest runs on the destination"
    statistics.ram.remaining_bytes = 10 * MIB
    assert statistics.report(MigrationStatus.ACTIVE).warnings == ()


@pytest.mark.parametrize(
    ("limit", "reason"),
    [({"x-migfw-timeout": 12_000}, "longer than 12.00 s"), ({"x-migfw-max-passes": 3}, "3 passes were sent")],
)
def test_a_limit_ends_it(limit: dict[str, Any], reason: str) -> None:
    world = World(4 * GIB, rate=800 * MIB, working_set=4 * GIB, bandwidth=500 * MIB)
    world.settings |= limit
    with pytest.raises(MigfwError, match=reason):
        world.downtime()
    assert world.now < 30


@pytest.mark.parametrize("limit", [{"x-migfw-timeout": 12_000}, {"x-migfw-max-passes": 1}])
def test_or_stops_the_guest(limit: dict[str, Any]) -> None:
    world = World(4 * GIB, rate=800 * MIB, working_set=4 * GIB, bandwidth=500 * MIB)
    world.settings |= limit | {"x-migfw-on-timeout": "switchover"}
    assert world.downtime() > 1
    assert world.now < 13
    (warning,) = world.statistics.warnings
    assert "so the guest was stopped with" in warning


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    world = World(4 * GIB, rate=100 * MIB)
    world.settings |= {"x-migfw-timeout": 60_000, "x-migfw-max-passes": 50}
    assert world.downtime() < 0.3
    assert world.statistics.warnings == []
