"""The moment when the guest is stopped, in virtual time, with a given bandwidth and dirty rate."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import pytest

from corefw.engine.convergence import FINISH, SHORT
from corefw.engine.forecast import Outlook
from corefw.engine.limits import Limits
from corefw.engine.meter import Meter
from corefw.engine.passes import Passes
from corefw.engine.postcopy_start import PostcopyStart
from corefw.engine.statistics import OutgoingStatistics
from corefw.machine import RunState
from corefw.section import Pending, SectionKey
from corefw.settings import Settings

MIB: Final = 1 << 20
GIB: Final = 1 << 30
BANDWIDTH: Final = 2 * GIB
PATIENCE: Final = 60.0


class NeverEnds(Exception):
    pass


class World:
    """A link, a guest and its only live saver; `now` in seconds.

    rate, working_set   bytes that the guest dirties in a second, and the number of different bytes among them
    ends_at             when the guest stops by itself
    harvests            the time of each harvest of the dirty log, and what was left
    """

    def __init__(self, ram: int, rate: int = 0, working_set: int = GIB, bandwidth: int = BANDWIDTH) -> None:
        self.now = 0.0
        self.left, self.rate, self.working_set, self.bandwidth = ram, rate, working_set, bandwidth
        self.limit: Callable[[], int] = lambda: 300
        self.ends_at = PATIENCE
        self.harvests: list[tuple[float, int]] = []
        self.dirty_sync_count, self.dirty_pages_rate, self.page_size, self.dirtied = 1, 0, 1, 0
        self.key = SectionKey("world", 0)
        self.settings: dict[str, Any] = {"x-migfw-on-timeout": "cancel"}
        configuration: Any = SimpleNamespace(
            integer=self._setting, parameter=self.settings.get, capability=self.settings.get
        )
        self.meter = Meter(configuration, clock=lambda: self.now)
        self.limits = Limits(configuration, self.meter.clock)
        self.configuration: Settings = configuration
        self.postcopy = PostcopyStart(self.configuration)
        self.switched: str | None = None
        self.statistics = OutgoingStatistics(self.meter)
        self.looks: list[tuple[float, Outlook, str | None]] = []  # (time, forecast, advice), at each check
        self._harvested = 0.0

    @property
    def run_state(self) -> RunState:
        return RunState.RUNNING if self.now < self.ends_at else RunState.PAUSED

    def harvest(self) -> None:
        seconds = min(self.now, self.ends_at) - min(self._harvested, self.ends_at)
        found = int(min(self.working_set, self.rate * seconds))
        self.left = min(max(self.left, self.working_set), self.left + found)
        self.dirtied += found
        self.dirty_sync_count += 1
        self._harvested = self.now
        self.harvests.append((self.now, self.left))

    # -- the saver -----------------------------------------------------------------------------------------------

    def pending_estimate(self) -> Pending:
        return Pending(0, self.left)

    def pending_exact(self) -> Pending:
        self.harvest()
        return Pending(0, self.left)

    def iterate(self, _writer: object, budget: int) -> bool:
        count = min(self.left, budget)
        self.left -= count
        self.now += (count + 8) / self.bandwidth
        self.meter.sent(count + 8)
        return not self.left

    # -- the writer ------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        pass

    def _setting(self, name: str) -> int:
        setting = self.limit() if name == "downtime-limit" else self.settings.get(name, 0)
        assert isinstance(setting, int)
        return setting

    # -- the run ---------------------------------------------------------------------------------------------------

    def downtime(self) -> float:
        """Send passes until the guest would be stopped; return the seconds that the rest takes."""

        def check() -> None:
            self.looks.append((self.now, self.statistics.outlook, self.statistics.advice))
            if self.now > PATIENCE:
                raise NeverEnds

        world: Any = self
        self.statistics.ram = world
        sections: Any = SimpleNamespace(part=lambda _, body: body())
        passes = Passes(
            world,
            [world],
            self.configuration,
            self.statistics,
            self.meter,
            self.limits,
            check,
            lambda _: None,
            self.postcopy,
        )
        passes.run(world, sections)
        self.switched = self.postcopy.reason
        self.harvest()
        return self.left / self.bandwidth


def test_a_guest_that_writes_little_is_down_for_its_last_writes() -> None:
    """With 100 MB/s of writes on a link of 2 GB/s each pass leaves a twentieth. QEMU would be down for 300 ms."""
    world = World(4 * GIB, rate=100 * MIB)
    assert world.downtime() < 2 * SHORT
    assert world.now < 4 * GIB / BANDWIDTH * 1.1


@pytest.mark.parametrize("ram", [GIB // 4, GIB], ids=["all of it would fit", "it would not"])
def test_the_log_is_not_harvested_while_a_pass_is_finished(ram: int) -> None:
    world = World(ram, rate=100 * MIB)
    world.downtime()
    times = [at for at, _ in world.harvests]
    assert times[0] >= ram / BANDWIDTH, "the first pass is soon sent, and so finished at once"
    assert len(times) <= 4


def test_passes_that_do_not_halve_are_not_gone_on_with() -> None:
    """The guest dirties 80 % of what is sent: a second pass would gain little, and what is left fits."""
    world = World(GIB, rate=int(0.8 * BANDWIDTH), working_set=500 * MIB)
    assert world.downtime() <= 0.3
    finished = [at for at, _ in world.harvests if at > GIB / BANDWIDTH]
    assert len(finished) <= 3


def test_what_does_not_converge_goes_on_until_the_limit_is_raised() -> None:
    with pytest.raises(NeverEnds):
        World(4 * GIB, rate=4 * GIB, working_set=2 * GIB, bandwidth=GIB).downtime()
    world = World(4 * GIB, rate=4 * GIB, working_set=2 * GIB, bandwidth=GIB)
    world.limit = lambda: 5000 if world.now > 10 else 300
    assert FINISH < world.downtime() < 5
    assert world.now < 10 + 5


def test_a_pass_that_is_not_soon_through_any_more_is_not_finished_at_any_price() -> None:
    """The link drops to a thousandth while a pass is being finished; then the limit is raised to force it."""

    class Narrowing(World):
        def iterate(self, writer: object, budget: int) -> bool:
            if self.now > 0.05:
                self.bandwidth = 2 * MIB
            return super().iterate(writer, min(budget, MIB))

    world = Narrowing(GIB // 4)
    world.limit = lambda: 2_000_000 if world.now > 2 else 300
    world.downtime()
    assert world.now < 5


@pytest.mark.parametrize(("rate", "limit"), [(0, 0), (10 * MIB, 1), (0, 300)])
def test_a_small_limit_is_kept(rate: int, limit: int) -> None:
    world = World(GIB, rate=rate)
    world.limit = lambda: limit
    assert world.downtime() * 1000 <= limit


def test_a_guest_that_is_paused_is_not_waited_for() -> None:
    world = World(GIB, rate=100 * MIB)
    world.ends_at = 0.0
    assert 0.2 < world.downtime() < 0.3


def test_a_guest_that_stops_in_the_middle_of_a_pass() -> None:
    world = World(GIB, rate=500 * MIB)
    world.ends_at = 0.3
    assert world.downtime() < 0.3


# -- when it switches to postcopy --------------------------------------------------------------------------------------


def switching(when: str, **guest: int) -> World:
    """A migration of 4 GiB at 1 GiB/s with this x-migfw-postcopy-start, until its guest is stopped."""
    world = World(4 * GIB, bandwidth=GIB, **guest)
    world.settings |= {"postcopy-ram": True, "x-migfw-postcopy-start": when}
    world.downtime()
    return world


def test_a_switch_at_once_sends_nothing_first() -> None:
    world = switching("now", rate=4 * GIB)
    assert world.now == 0
    assert world.switched == "it was to switch at once"


def test_a_switch_after_the_first_pass() -> None:
    world = switching("after-first-pass", rate=4 * GIB, working_set=2 * GIB)
    assert world.now == pytest.approx(4, rel=0.1)
    assert world.switched == "everything has been sent once"


def test_no_switch_after_the_first_pass_if_the_rest_fits() -> None:
    world = switching("after-first-pass", rate=MIB, working_set=MIB)
    assert world.switched is None


def test_a_switch_when_precopy_does_not_converge() -> None:
    world = switching("when-stuck", rate=4 * GIB, working_set=2 * GIB)
    assert 4 < world.now < 30, "not before it was seen that passes do not get smaller"
    assert world.switched is not None
    assert "does not converge, because the guest dirties" in world.switched


def test_no_switch_when_precopy_converges() -> None:
    world = switching("when-stuck", rate=300 * MIB, working_set=2 * GIB)
    assert world.switched is None


@pytest.mark.parametrize("when", ["on-command", "when-stuck"])
def test_a_switch_on_command(when: str) -> None:
    world = World(4 * GIB, rate=4 * GIB, working_set=2 * GIB, bandwidth=GIB)
    world.settings |= {"postcopy-ram": True, "x-migfw-postcopy-start": when}
    world.postcopy.request()
    world.downtime()
    assert (world.now, world.switched) == (0, "migrate-start-postcopy asked for it")
