"""Runs a migration as a machine of phases.

Each side has one table that maps a status to the function that runs while the migration has that status. The function
returns the next status, so a migration can leave a phase and come back to it (pause, resume, checkpoint), and a new
phase is a new row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from corefw.errors import Interrupted
from corefw.states import MigrationStatus, StateMachine

_Migration = TypeVar("_Migration")


def run_phases(
    state: StateMachine,
    phases: Mapping[MigrationStatus, Callable[[_Migration], MigrationStatus]],
    migration: _Migration,
) -> MigrationStatus:
    """Run the phase of the present status, enter the status that it returns, run that one's phase, and so on.

    Returns the first status that has no phase. The caller enters it when everything has been cleaned up, so that an
    observer of the end sees the guest as it will stay. Raises what the phases raise, and Interrupted if another thread
    changed the status meanwhile: that is how a migration is cancelled.
    """
    status = state.status
    while (phase := phases.get(status)) is not None:
        following = phase(migration)
        if following in phases and not state.advance(status, following):
            raise Interrupted("cancelled")
        status = following
    return status
