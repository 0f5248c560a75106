"""The states of a migration, and every change between them that can be.

Invariant: a state moves by `advance(expected, new)`, a compare-and-swap against the table of its side; a change that is
not in the table is a bug and raises. Observers hear of it with no lock held, in the order of the changes.
Source: QEMU's migrate_set_state and its callers; the names are QAPI's MigrationStatus.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final

from corefw.errors import FOREIGN
from corefw.news import News

log = logging.getLogger(__name__)


class MigrationStatus(StrEnum):
    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
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
        _S.POSTCOPY_RECOVER,
        _S.PRE_SWITCHOVER,
        _S.DEVICE,
    }
)
"""A migration runs, and can be cancelled (migration_is_setup_or_active)."""

SOURCE_TRANSITIONS: Final[Mapping[MigrationStatus, frozenset[MigrationStatus]]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.CANCELLING, _S.FAILING}),
    _S.ACTIVE: frozenset(
        {_S.PRE_SWITCHOVER, _S.DEVICE, _S.POSTCOPY_ACTIVE, _S.COLO, _S.COMPLETED, _S.CANCELLING, _S.FAILING}
    ),
    _S.PRE_SWITCHOVER: frozenset({_S.DEVICE, _S.POSTCOPY_ACTIVE, _S.CANCELLING, _S.FAILING}),
    _S.DEVICE: frozenset({_S.COMPLETED, _S.CANCELLING, _S.FAILING}),
    _S.POSTCOPY_ACTIVE: frozenset({_S.POSTCOPY_PAUSED, _S.COMPLETED, _S.CANCELLING, _S.FAILING}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER, _S.CANCELLING, _S.FAILING}),
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.CANCELLING, _S.FAILING}),
    _S.COLO: frozenset({_S.COMPLETED, _S.FAILING}),
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.COMPLETED}),
    _S.FAILING: frozenset({_S.FAILED}),
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.COMPLETED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
}
"""A finished migration goes straight to SETUP of the next (QEMU resets to NONE and says nothing). A cancel that comes
when the destination has the guest already is too late: the migration completes. In FAILING (since QEMU 11.0) the guest
is taken back and everything is closed; FAILED says that this is done."""

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


Observer = Callable[[Side, MigrationStatus, MigrationStatus], None]


class StateMachine:
    """One side's status. Thread-safe."""

    def __init__(self, side: Side) -> None:
        self.side: Final = side
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._status = MigrationStatus.NONE
        self._observers: list[Observer] = []
        self._notes: list[Observer] = []
        self._news = News(self._tell)

    @property
    def status(self) -> MigrationStatus:
        return self._status

    def observe(self, observer: Observer) -> None:
        """Call `observer(side, old, new)` after each change, in the thread of some `advance()`.

        One change at a time: every observer has heard of it before the first one hears of the next, also where an
        observer makes the next change itself. What an observer raises is logged and goes no further.
        """
        self._observers.append(observer)

    def note(self, note: Observer) -> None:
        """Call `note(side, old, new)` at each change, at once and under locks: it may write that down and nothing more.
        So what is written down elsewhere because of the change comes after it."""
        self._notes.append(note)

    def advance(self, expected: MigrationStatus, new: MigrationStatus) -> bool:
        """Go from `expected` to `new`; False, and nothing happened, when the state was another one by now.

        Raises AssertionError for a transition that is not in the table: that is a bug here, not a user's error.
        """
        moved = self.move(expected, new)
        self.announce()
        return moved

    def move(self, expected: MigrationStatus, new: MigrationStatus) -> bool:
        """As advance(), for a caller that holds a lock: it calls announce() when that is let go."""
        if new not in TRANSITIONS[self.side].get(expected, frozenset()):
            raise AssertionError(f"the {self.side} never goes from '{expected}' to '{new}'")
        with self._lock:
            if self._status is not expected:
                return False
            self._status = new
            for note in self._notes:
                note(self.side, expected, new)
            self._news.post((expected, new))
            self._changed.notify_all()
        log.info("%s: %s -> %s", self.side, expected, new)
        return True

    def announce(self) -> None:
        """Tell the observers of what was moved, unless another thread is just doing that."""
        self._news.tell()

    def wait(self, statuses: frozenset[MigrationStatus], seconds: float | None = None) -> bool:
        """Block until the status is one of these; False after `seconds`."""
        with self._lock:
            return self._changed.wait_for(lambda: self._status in statuses, seconds)

    def _tell(self, change: tuple[MigrationStatus, MigrationStatus]) -> None:
        for observer in tuple(self._observers):
            try:
                observer(self.side, *change)
            except FOREIGN:
                log.exception("an observer of the %s's status failed", self.side)
