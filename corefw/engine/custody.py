"""Which side may run the guest while it moves.

Invariant: the guest belongs to the source until the destination may be running it. Once it is stopped for the
switchover, only this module starts it here, and only if it cannot be running there: the stream has not been completed,
or the destination itself has reported that it failed. If there is no way to know, the guest stays stopped and the user
decides.

Source: QEMU 10.0, migration_completion and migration_iteration_finish.
Threads: the migration thread; `held` may be read by any thread that holds the guest lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Final

from corefw.engine.guestlock import GuestLock
from corefw.errors import ANYTHING
from corefw.machine import Machine, RunState, ThrottlableMachine
from corefw.section import Section

log = logging.getLogger(__name__)

MAY_RUN_THERE: Final = "; the destination had everything and may be running the guest, so it stays stopped here"


class Custody:
    """The hold of a single migration on the guest.

    held          the guest was stopped for the switchover, and has not been let go or taken back yet
    handed_over   the destination may be running it
    deciding      held while the guest is handed over, and while a cancel finds out whether it was
    """

    def __init__(self, machine: Machine, lock: GuestLock, advice: str) -> None:
        """`advice`: what a user can do with a guest that stays stopped because it may be running there."""
        self.held = False
        self.handed_over = False
        self.deciding: Final = threading.Lock()
        self._machine = machine
        self._lock = lock
        self._advice = advice
        self._before = machine.run_state

    def stop(self, check: Callable[[], None], store: Callable[[RunState], None]) -> None:
        """Stop the guest; `store` is called with the run state it had. Raises MachineError and what `check` raises;
        the guest is then as it was."""
        with self._lock.unless(check):
            self._before = self._machine.run_state
            store(self._before)
            self._machine.stop(RunState.FINISH_MIGRATE)
            self.held = True

    def throttle(self, machine: ThrottlableMachine, percent: int, check: Callable[[], None]) -> None:
        """Slow it down. Raises as stop() does."""
        with self._lock.unless(check):
            machine.throttle(percent)

    def hand_over_at_eof(self, check: Callable[[], None], *, visible: bool) -> None:
        """Precopy: the end mark is about to go out, and the destination starts the guest once it has that. `visible`
        is False if nothing of the stream can be seen before it was ended cleanly (a file). Raises what `check` raises;
        the guest is then still ours."""
        with self.deciding:
            check()
            self.handed_over = visible

    def hand_over_at_run(self, check: Callable[[], None]) -> None:
        """Postcopy: the command RUN is about to go out, and the destination starts the guest with it. Raises what
        `check` raises; the guest is then still ours."""
        with self.deciding:
            check()
            self.handed_over = True

    def let_go(self) -> None:
        """Leave the guest to the destination, or to the file. `held` stays set until the migration's status has
        changed."""
        with self._lock.held():
            self._enter(RunState.POSTMIGRATE)

    def take_back(self, *, refused: bool) -> str:
        """The migration failed: start the guest again if it ran before, unless it may be running there. `refused`: the
        destination reported that it failed, so it does not run the guest. Returns what to append to the error."""
        if not self.held:
            return ""
        if self.handed_over and not refused:
            self.let_go()
            return f"{MAY_RUN_THERE} ({self._advice})"
        with self._lock.held():
            self.held = False
            if self._before is not RunState.RUNNING:
                self._enter(self._before)
                return ""
            try:
                self._machine.start()
            except ANYTHING as error:  # the migration has to end, whatever a machine does
                log.debug("the guest does not start", exc_info=True)
                return f"; and the guest could not be started again: {error}"
        return ""

    def _enter(self, state: RunState) -> None:
        try:
            self._machine.set_run_state(state)
        except ANYTHING:
            log.exception("the guest did not become '%s'", state)


def tell_outcome(sections: Iterable[Section], *, committed: bool) -> None:
    """Tell each section how the migration ended. Exceptions are logged: it has ended, whatever they say."""
    for section in sections:
        try:
            section.committed() if committed else section.abandoned()
        except ANYTHING:
            log.exception("section %s: %s failed", section.key, "committed()" if committed else "abandoned()")
