"""The driver of a migration's phases: it follows the table, may come back to a phase, and notices a cancel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from corefw.dispatch import EventDispatcher
from corefw.engine import incoming, outgoing
from corefw.engine.phases import run_phases
from corefw.errors import Interrupted
from corefw.states import SETUP_OR_ACTIVE, MigrationStatus, Side, StateMachine, StatusChanged

_S = MigrationStatus

Log = list[str]


def step(name: str, following: MigrationStatus) -> Callable[[Log], MigrationStatus]:
    def phase(log: Log) -> MigrationStatus:
        log.append(name)
        return following

    return phase


def started(events: EventDispatcher | None = None) -> StateMachine:
    state = StateMachine(Side.SOURCE, events or EventDispatcher())
    state.advance(_S.NONE, _S.SETUP)
    return state


def test_phases_follow_one_another_until_a_status_has_none() -> None:
    events = EventDispatcher()
    state, log = started(events), Log()
    seen: list[str] = []
    events.observe(lambda event: seen.append(event.new) if isinstance(event, StatusChanged) else None)
    phases = {
        _S.SETUP: step("setup", _S.ACTIVE),
        _S.ACTIVE: step("precopy", _S.DEVICE),
        _S.DEVICE: step("switch over", _S.COMPLETED),
    }
    assert run_phases(state, phases, log) is _S.COMPLETED
    assert log == ["setup", "precopy", "switch over"]
    assert seen == ["active", "device"], "the last status is left to the caller"


def test_a_phase_may_be_entered_again() -> None:
    """As in a postcopy that pauses twice."""
    state, log = started(), Log()
    outcomes = iter([_S.POSTCOPY_PAUSED, _S.POSTCOPY_PAUSED, _S.COMPLETED])
    phases: Mapping[MigrationStatus, Callable[[Log], MigrationStatus]] = {
        _S.SETUP: step("setup", _S.ACTIVE),
        _S.ACTIVE: step("precopy", _S.POSTCOPY_ACTIVE),
        _S.POSTCOPY_ACTIVE: lambda log: step("postcopy", next(outcomes))(log),
        _S.POSTCOPY_PAUSED: step("pause", _S.POSTCOPY_RECOVER_SETUP),
        _S.POSTCOPY_RECOVER_SETUP: step("dial", _S.POSTCOPY_RECOVER),
        _S.POSTCOPY_RECOVER: step("recover", _S.POSTCOPY_ACTIVE),
    }
    assert run_phases(state, phases, log) is _S.COMPLETED
    assert log == ["setup", "precopy", *["postcopy", "pause", "dial", "recover"] * 2, "postcopy"]


def test_a_cancel_from_another_thread_ends_it() -> None:
    state = started()

    def cancelled_meanwhile(log: Log) -> MigrationStatus:
        log.append("setup")
        assert state.advance(_S.SETUP, _S.CANCELLING)
        return _S.ACTIVE

    log = Log()
    with pytest.raises(Interrupted):
        run_phases(state, {_S.SETUP: cancelled_meanwhile, _S.ACTIVE: step("precopy", _S.COMPLETED)}, log)
    assert log == ["setup"] and state.status is _S.CANCELLING


def test_every_status_in_which_a_migration_runs_has_a_phase() -> None:
    assert outgoing.PHASES.keys() == SETUP_OR_ACTIVE
    assert incoming.PHASES.keys() == SETUP_OR_ACTIVE - {_S.PRE_SWITCHOVER, _S.DEVICE, _S.POSTCOPY_RECOVER_SETUP}
