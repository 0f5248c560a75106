"""The states: every pair of them, compare-and-swap in threads, observers in order, and the page with the tables."""

import itertools
import re
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from corefw.dispatch import Event, EventDispatcher
from corefw.states import (
    IDLE,
    SETUP_OR_ACTIVE,
    TRANSITIONS,
    MigrationStatus,
    Side,
    StateMachine,
    StatusChanged,
    diagram,
)

S = MigrationStatus
PAGE = Path(__file__).parents[1] / "docs" / "states.md"

SURFACE = [
    *("none", "setup", "cancelling", "cancelled", "active", "postcopy-active", "postcopy-paused"),
    *("postcopy-recover-setup", "postcopy-recover"),
    *("completed", "failing", "failed", "colo", "pre-switchover", "device"),
]


def reach(side: Side, status: MigrationStatus) -> StateMachine:
    """Bring a machine into this state along the table's transitions."""
    paths = {S.NONE: [S.NONE]}
    frontier = [S.NONE]
    for known in frontier:
        for new in sorted(TRANSITIONS[side][known] - paths.keys()):
            paths[new] = [*paths[known], new]
            frontier.append(new)
    machine = StateMachine(side, EventDispatcher())
    for old, new in pairwise(paths[status]):
        assert machine.advance(old, new)
    assert machine.status is status
    return machine


def test_the_names_are_those_of_the_surface() -> None:
    assert [str(status) for status in S] == SURFACE


@pytest.mark.parametrize("side", Side)
def test_every_state_of_a_table_can_be_reached_and_is_known(side: Side) -> None:
    table = TRANSITIONS[side]
    for status in table:
        reach(side, status)
    assert set().union(*table.values()) <= table.keys()


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("old", S)
@pytest.mark.parametrize("new", S)
def test_every_pair_is_in_the_table_or_a_bug(side: Side, old: MigrationStatus, new: MigrationStatus) -> None:
    if new in TRANSITIONS[side].get(old, ()):
        machine = reach(side, old)
        assert machine.advance(old, new)
        assert machine.status is new
    else:
        machine = StateMachine(side, EventDispatcher())
        with pytest.raises(AssertionError, match=f"the {side} never goes from '{old}' to '{new}'"):
            machine.advance(old, new)
        assert machine.status is S.NONE


def test_a_migration_is_idle_or_runs_or_ends() -> None:
    assert not IDLE & SETUP_OR_ACTIVE
    assert set(S) - IDLE - SETUP_OR_ACTIVE == {S.CANCELLING, S.COLO, S.FAILING}
    source = TRANSITIONS[Side.SOURCE]
    assert all(source[status] == {S.SETUP} for status in IDLE), "a new migration may start, and nothing else"
    for status in SETUP_OR_ACTIVE:
        assert {S.CANCELLING, S.FAILING} <= source[status], f"'{status}' can be cancelled and can fail"


class AnyCalls(RuleBasedStateMachine):
    """Any sequence of advances behaves like a dictionary and a variable."""

    @initialize(side=st.sampled_from(Side))
    def make(self, side: Side) -> None:
        events = EventDispatcher()
        self.machine = StateMachine(side, events)
        self.model = S.NONE
        self.heard: list[tuple[Side, MigrationStatus, MigrationStatus]] = []
        self.expected: list[tuple[Side, MigrationStatus, MigrationStatus]] = []

        def observe(event: Event) -> None:
            assert isinstance(event, StatusChanged)
            self.heard.append((event.side, event.old, event.new))

        events.observe(observe)

    @rule(expected=st.sampled_from(S), new=st.sampled_from(S))
    def advance(self, expected: MigrationStatus, new: MigrationStatus) -> None:
        self.try_advance(expected, new)

    @rule(choice=st.integers(0, len(S)))
    def follow_the_table(self, choice: int) -> None:
        after = sorted(TRANSITIONS[self.machine.side][self.model])
        if after:
            self.try_advance(self.model, after[choice % len(after)])

    def try_advance(self, expected: MigrationStatus, new: MigrationStatus) -> None:
        if new not in TRANSITIONS[self.machine.side].get(expected, ()):
            with pytest.raises(AssertionError):
                self.machine.advance(expected, new)
            return
        moved = self.machine.advance(expected, new)
        assert moved == (self.model is expected)
        if moved:
            self.expected.append((self.machine.side, expected, new))
            self.model = new

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "machine"):
            assert self.machine.status is self.model
            assert self.heard == self.expected


TestAnyCalls = AnyCalls.TestCase


def test_of_many_threads_that_want_the_same_change_one_makes_it() -> None:
    for _ in range(20):
        machine = reach(Side.SOURCE, S.ACTIVE)
        start = threading.Barrier(8)
        won: list[MigrationStatus] = []

        def contend(
            new: MigrationStatus,
            machine: StateMachine = machine,
            start: threading.Barrier = start,
            won: list[MigrationStatus] = won,
        ) -> None:
            start.wait()
            if machine.advance(S.ACTIVE, new):
                won.append(new)

        wishes = [S.CANCELLING, S.FAILING, S.DEVICE, S.PRE_SWITCHOVER] * 2
        threads = [threading.Thread(target=contend, args=(wish,)) for wish in wishes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [machine.status]


def test_changes_by_two_threads_are_heard_one_at_a_time_and_in_order() -> None:
    events = EventDispatcher()
    machine = StateMachine(Side.SOURCE, events)
    heard: list[MigrationStatus] = []
    busy = threading.Lock()

    def observer(event: Event) -> None:
        assert isinstance(event, StatusChanged)
        assert busy.acquire(blocking=False), "two observers at once"
        heard.append(event.new)
        busy.release()

    events.observe(observer)
    steps = [S.NONE, S.SETUP, S.ACTIVE, S.CANCELLING, S.CANCELLED, S.SETUP, S.FAILING, S.FAILED, S.SETUP]

    def walk(mine: int) -> None:
        for at, (old, new) in enumerate(pairwise(steps)):
            if at % 2 == mine:
                while not machine.advance(old, new):
                    machine.wait(frozenset({old}), 0.01)

    threads = [threading.Thread(target=walk, args=(mine,)) for mine in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == steps[1:]


def test_waiting_for_a_status() -> None:
    machine = StateMachine(Side.SOURCE, EventDispatcher())
    assert machine.wait(frozenset({S.NONE}))
    assert not machine.wait(frozenset({S.SETUP}), 0)
    thread = threading.Thread(target=machine.advance, args=(S.NONE, S.SETUP))
    thread.start()
    assert machine.wait(frozenset({S.SETUP, S.FAILED}))
    thread.join()


def test_waiting_for_a_change_that_may_be_over() -> None:
    machine = StateMachine(Side.SOURCE, EventDispatcher())
    before = machine.changes
    assert not machine.wait_change(before, 0)
    for old, new in itertools.pairwise((S.NONE, S.SETUP, S.FAILING, S.FAILED, S.SETUP)):
        machine.advance(old, new)
    assert machine.wait_change(before, 0) and machine.wait_change(before + 3, 0)
    assert not machine.wait_change(before + 4, 0)


@pytest.mark.parametrize("side", Side)
def test_the_page_shows_the_table(side: Side) -> None:
    shown = re.findall(r"```mermaid\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert diagram(side) in shown, f"put this into docs/states.md:\n{diagram(side)}"
