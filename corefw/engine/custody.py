"""Whose the guest is while it moves.

Invariant: the guest is the source's until the destination may be running it. From the moment when it is stopped for the
switchover only this module starts it here, and only when it cannot be running there: nothing that completes the stream
has gone out, or the destination itself has said that it failed. Where nobody can know, it stays stopped, and a human
decides.

Source: QEMU's migration_completion and migration_iteration_finish.
Threads: the migration thread; `held` may be read from any that holds the guest's lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from corefw.engine.guestlock import GuestLock
from corefw.errors import ANYTHING
from corefw.machine import AdoptsStreams, Machine, RunState, SupportsThrottle

log = logging.getLogger(__name__)

MAY_RUN_THERE: Final = "; the destination had everything and may be running the guest, so it stays stopped here"
CONT: Final = " ('cont' starts it, if you know that the destination does not run it)"
SEND_AGAIN: Final = " (parked, it cannot run: migrate it again, if you know that the destination does not run it)"


class Custody:
    """One migration's hold on the guest.

    held          it was stopped for the switchover, and has not been let go or taken back
    handed_over   what completes the stream has begun to go out: the destination may be running it
    """

    def __init__(self, machine: Machine, lock: GuestLock) -> None:
        self.held = False
        self.handed_over = False
        self._machine = machine
        self._lock = lock
        self._before = machine.run_state

    def stop(self, check: Callable[[], None], store: Callable[[RunState], None]) -> None:
        """Stop the guest; `store` is given its run state before. Raises MachineError and what `check` raises; then the
        guest is as it was."""
        with self._lock.unless(check):
            self._before = self._machine.run_state
            store(self._before)
            self._machine.stop(RunState.FINISH_MIGRATE)
            self.held = True

    def throttle(self, machine: SupportsThrottle, percent: int, check: Callable[[], None]) -> None:
        """Slow it down. Raises as stop() does."""
        with self._lock.unless(check):
            machine.throttle(percent)

    def let_go(self) -> None:
        """It is the destination's, or stored. `held` stays: the migration's status says when it is over."""
        with self._lock.held():
            self._enter(RunState.POSTMIGRATE)

    def take_back(self, *, refused: bool) -> str:
        """The migration failed: let the guest run on if it ran before, unless it may run there. `refused`: the
        destination said that it does not. Returns what to add to the reason."""
        if not self.held:
            return ""
        if self.handed_over and not refused:
            self.let_go()
            return MAY_RUN_THERE + (SEND_AGAIN if isinstance(self._machine, AdoptsStreams) else CONT)
        with self._lock.held():
            self.held = False
            if self._before is not RunState.RUNNING:
                self._enter(self._before)
                return ""
            try:
                self._machine.start()
            except ANYTHING as error:  # a machine is a plugin: whatever it does, the migration has to end
                log.debug("the guest does not start", exc_info=True)
                return f"; and the guest could not be started again: {error}"
        return ""

    def _enter(self, state: RunState) -> None:
        try:
            self._machine.set_run_state(state)
        except ANYTHING:
            log.exception("the guest did not become '%s'", state)
