"""The states of a migration, and every change between them that can be.

Invariant: a state moves by `advance(expected, new)`, a compare-and-swap against the table of its side; a change that is
not in the table is a bug and raises.
Source: QEMU's migrate_set_state and its callers; the names are QAPI's MigrationStatus.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from corefw.dispatch import Event, EventDispatcher

log = logging.getLogger(__name__)


class MigrationStatus(StrEnum):
    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"


class Side(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


_S = MigrationStatus

IDLE: Final = frozenset({_S.NONE, _S.CANCELLED, _S.COMPLETED, _S.FAILED})
"""A new migration may start (migration_is_idle)."""

SETUP_OR_ACTIVE: Final = frozenset(
    {
        _S.SETUP,
        _S.ACTIVE,
        _S.POSTCOPY_ACTIVE,
        _S.POSTCOPY_PAUSED,
        _S.POSTCOPY_RECOVER_SETUP,
        _S.POSTCOPY_RECOVER,
        _S.PRE_SWITCHOVER,
        _S.DEVICE,
    }
)
"""A migration runs, and can be cancelled (migration_is_setup_or_active)."""

POSTCOPY: Final = frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.POSTCOPY_RECOVER_SETUP, _S.POSTCOPY_RECOVER})
"""The guest belongs to the destination, and not all of it is there yet (migration_in_postcopy)."""

IN_POSTCOPY: Final = "Postcopy migration in progress, cannot cancel."
"""What both sides say to a cancel then (QEMU 10.1, qmp_migrate_cancel)."""

CONNECTED: Final = POSTCOPY - {_S.POSTCOPY_PAUSED}
"""A postcopy that has a connection or dials one, which migrate-pause breaks (migration_postcopy_is_alive)."""

SENDING: Final = frozenset({*SETUP_OR_ACTIVE - {_S.SETUP}, _S.CANCELLING})
"""The guest's state is being sent: query-migrate has the figures of the moment (fill_source_migration_info)."""

SOURCE_TRANSITIONS: Final[Mapping[MigrationStatus, frozenset[MigrationStatus]]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.CANCELLING, _S.FAILING}),
    _S.ACTIVE: frozenset({_S.PRE_SWITCHOVER, _S.DEVICE, _S.POSTCOPY_ACTIVE, _S.COLO, _S.CANCELLING, _S.FAILING}),
    _S.PRE_SWITCHOVER: frozenset({_S.DEVICE, _S.POSTCOPY_ACTIVE, _S.CANCELLING, _S.FAILING}),
    _S.DEVICE: frozenset({_S.COMPLETED, _S.CANCELLING, _S.FAILING}),
    _S.POSTCOPY_ACTIVE: frozenset({_S.POSTCOPY_PAUSED, _S.COMPLETED, _S.CANCELLING, _S.FAILING}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER_SETUP, _S.CANCELLING, _S.FAILING}),
    _S.POSTCOPY_RECOVER_SETUP: frozenset({_S.POSTCOPY_RECOVER, _S.POSTCOPY_PAUSED, _S.CANCELLING, _S.FAILING}),
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.COMPLETED, _S.CANCELLING, _S.FAILING}),
    _S.COLO: frozenset({_S.COMPLETED, _S.FAILING}),
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.COMPLETED}),
    _S.FAILING: frozenset({_S.FAILED}),
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.COMPLETED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
}
"""A finished migration goes straight to SETUP of the next (QEMU resets to NONE and says nothing). A cancel that comes
when the destination has the guest already is too late: the migration completes. In FAILING (since QEMU 11.0) the guest
is taken back and everything is closed; FAILED says that this is done. POSTCOPY_RECOVER_SETUP (since QEMU 9.1) is a
source that dials; a recovery completes the migration if the destination had everything already."""

DESTINATION_TRANSITIONS: Final[Mapping[MigrationStatus, frozenset[MigrationStatus]]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.CANCELLED, _S.FAILED}),
    _S.ACTIVE: frozenset({_S.POSTCOPY_ACTIVE, _S.COLO, _S.COMPLETED, _S.CANCELLED, _S.FAILED}),
    _S.POSTCOPY_ACTIVE: frozenset({_S.POSTCOPY_PAUSED, _S.COMPLETED, _S.FAILED}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER, _S.FAILED}),
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.FAILED}),
    _S.COLO: frozenset({_S.COMPLETED, _S.FAILED}),
    _S.COMPLETED: frozenset(),
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
}
"""A destination that failed or was cancelled may be told to wait again (migrate-incoming); one that completed runs the
guest."""

TRANSITIONS: Final[Mapping[Side, Mapping[MigrationStatus, frozenset[MigrationStatus]]]] = {
    Side.SOURCE: SOURCE_TRANSITIONS,
    Side.DESTINATION: DESTINATION_TRANSITIONS,
}


def diagram(side: Side) -> str:
    """The table of one side as a Mermaid state diagram; docs/states.md shows it."""
    table = TRANSITIONS[side]
    ids = {status: status.replace("-", "_") for status in MigrationStatus}  # Mermaid's have no hyphen
    names = [f'    state "{status}" as {ids[status]}' for status in table if ids[status] != status]
    edges = [f"    {ids[old]} --> {ids[new]}" for old in table for new in MigrationStatus if new in table[old]]
    return "\n".join(["stateDiagram-v2", *names, "    [*] --> none", *edges])


@dataclass(frozen=True, slots=True)
class StatusChanged(Event):
    """The status of one side's migration changed."""

    side: Side
    old: MigrationStatus
    new: MigrationStatus


class StateMachine:
    """One side's status. Thread-safe. Every change is an event, StatusChanged."""

    def __init__(self, side: Side, events: EventDispatcher) -> None:
        self.side: Final = side
        self._events = events
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._status = MigrationStatus.NONE
        self._changes = 0

    @property
    def status(self) -> MigrationStatus:
        return self._status

    @property
    def changes(self) -> int:
        """How often it has changed so far."""
        return self._changes

    def advance(self, expected: MigrationStatus, new: MigrationStatus) -> bool:
        """Go from `expected` to `new`; False, and nothing happened, if the status is another one by now.

        Observers hear of it before this returns, unless another thread is just delivering events; a caller that holds
        a lock calls this inside EventDispatcher.hold(). Raises AssertionError for a transition that is not in the
        table: a bug here, not a user's error.
        """
        if new not in TRANSITIONS[self.side].get(expected, frozenset()):
            raise AssertionError(f"the {self.side} never goes from '{expected}' to '{new}'")
        with self._lock:
            if self._status is not expected:
                return False
            self._status = new
            self._changes += 1
            self._events.post(StatusChanged(self.side, expected, new))
            self._changed.notify_all()
        log.info("%s: %s -> %s", self.side, expected, new)
        self._events.deliver()
        return True

    def wait(self, statuses: frozenset[MigrationStatus], seconds: float | None = None) -> bool:
        """Block until the status is one of these; False after `seconds`."""
        with self._lock:
            return self._changed.wait_for(lambda: self._status in statuses, seconds)

    def wait_change(self, before: int, seconds: float | None = None) -> bool:
        """Block until it has changed more than `before` times, even if it is the same again; False after `seconds`."""
        with self._lock:
            return self._changed.wait_for(lambda: self._changes > before, seconds)
