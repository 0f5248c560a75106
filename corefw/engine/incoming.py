"""One incoming migration: the thread that runs its phases, how it is cancelled, and how it ends.

The stream is hostile until it is loaded. Whatever is wrong with it ends in `failed` with the offset, what was expected
and what came; the source gets SHUT 1, and before that the reason if it is a migfw; and the guest is never started here.
Once it was started here, nothing that goes wrong makes the source believe that it was not.

Source: QEMU 10.0, process_incoming_migration_co and _bh, qemu_loadvm_state.
Threads: one of its own; the public methods may be called from any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Final

from corefw.control import AllocationReport, BlocktimeReport
from corefw.engine import arrival, postcopy_arrival
from corefw.engine.destination import Destination
from corefw.engine.outcome import Outcome
from corefw.engine.phases import run_phases
from corefw.engine.readmission import Readmission
from corefw.errors import ANYTHING, Interrupted, MigfwError
from corefw.machine import RamMakingMachine
from corefw.states import POSTCOPY, MigrationStatus, StateMachine

log = logging.getLogger(__name__)

_S = MigrationStatus

PHASES: Final[Mapping[MigrationStatus, Callable[[Destination], MigrationStatus]]] = {
    _S.SETUP: arrival.set_up,
    _S.ACTIVE: arrival.load_guest,
    _S.POSTCOPY_ACTIVE: postcopy_arrival.receive_rest,
    _S.POSTCOPY_PAUSED: postcopy_arrival.await_recovery,
    _S.POSTCOPY_RECOVER: postcopy_arrival.load_recovery,
}
"""The phase of each status. To add one, write a function and give it a row; DESTINATION_TRANSITIONS has to allow the
status changes that it makes.

A phase may be entered again: Destination keeps what has to outlive it, and Destination.connection what belongs to the
connection. Commands of the stream end a phase by returning the next status (commands.py). A phase raises MigfwError to
end the migration.
"""

CANCEL_SECONDS: Final = 5.0
"""Seconds that a cancelled migration has to tell its source. One whose source reads nothing is cut off then."""


class IncomingMigration:
    """Takes a guest in: runs the phases of a destination.

    error     why it failed
    warning   what the user has to check before the guest goes on; empty if there is nothing
    """

    def __init__(self, destination: Destination, state: StateMachine) -> None:
        self.error: str | None = None
        self.warning = ""
        self._destination = destination
        self._state = state
        self._cancelling = threading.Lock()  # guards the start of the timer
        self._cut_off = threading.Timer(CANCEL_SECONDS, self.abort)
        self._cut_off.daemon = True
        self._thread = threading.Thread(target=self._run, name="incoming migration", daemon=True)
        self._aborted = False
        self._outcome: Outcome | None = None
        self._heard = False  # by the source, how it ended

    # -- from other threads ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to wait for a source. Raises RuntimeError if the host has no thread left."""
        self._destination.allocate_ram()
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing of it goes on, unless its own thread asks (in an observer)."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def problem(self) -> str | None:
        """Why it failed, or why it is paused."""
        return self.error or self._destination.why_paused

    def figures(self) -> dict[str, dict[str, object]]:
        """What the loaders report of themselves, by section."""
        return self._destination.figures()

    def blocktime(self) -> BlocktimeReport | None:
        """How long the guest has waited for pages; None where that is not measured."""
        measured = self._destination.blocktime
        return measured.report() if measured is not None else None

    @property
    def has_part_of_guest(self) -> bool:
        """Whether the guest is here, or about to be, while a part of its RAM is still on the source."""
        guest = self._destination.guest
        return self._state.status in POSTCOPY and guest is not None and not guest.is_whole

    def guest_waits(self) -> bool:
        """Whether the guest waits for a page that has not arrived."""
        guest = self._destination.guest
        return guest is not None and guest.faults.guest_waits()

    def preallocation(self) -> AllocationReport:
        """How much of the guest's RAM is allocated."""
        return AllocationReport(*self._destination.preallocation.progress())

    def abort(self) -> None:
        """End it, wherever it is, and tell the source nothing more."""
        self._aborted = True
        self._destination.abort()

    def close(self) -> None:
        """Wait until nothing of it goes on, after abort()."""
        self.join()
        if self._outcome is not None:
            self._outcome.close()

    def cancel(self) -> None:
        """End it, unless the guest is here already, and tell the source; the status becomes `cancelled`. Raises
        StateError once a postcopy has taken the guest over."""
        self._destination.cancel()
        with self._cancelling:
            if self._cut_off.ident is None:
                self._cut_off.start()

    @property
    def readmission(self) -> Readmission:
        """In postcopy: where the source may come back to (migrate-recover), also to hear how it ended."""
        return self._outcome.readmission if self._outcome is not None else self._destination.readmission

    @property
    def tells_outcome(self) -> bool:
        """It has ended, and a source that missed how can be told."""
        return self._outcome is not None

    @property
    def owes_outcome(self) -> bool:
        """In postcopy, RUN was read, and the source may not have heard the outcome: until then it does not start the
        guest again."""
        return self._destination.has_taken_over and not self._heard

    def pause(self) -> bool:
        """Break the connection of a postcopy on purpose (migrate-pause); False if the guest is here whole already."""
        guest = self._destination.guest
        if guest is None or guest.is_whole:
            return False
        self._destination.break_connection()
        return True

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        destination = self._destination
        reason: str | None = None
        try:
            if run_phases(self._state, PHASES, destination) is not _S.COMPLETED:
                raise Interrupted("cancelled")  # before the first phase
        except MigfwError as error:
            reason = str(destination.cause(error))
        except ANYTHING as bug:
            log.exception("the incoming migration failed")
            reason = f"internal error: {type(bug).__name__}: {bug}"
        if reason is not None:
            destination.interrupt_load()  # loaders may be waiting for their channels in threads that cleanup() joins
        destination.clean_loaders_up()
        destination.stop_listening()
        if reason is None:
            self._succeed()
        else:
            reason = self._fail(reason)
        self._cut_off.cancel()
        destination.close()
        if not self._aborted:
            self._outcome = destination.outcome(reason or "", heard=self._heard)

    def _succeed(self) -> None:
        self._destination.commit_loaders()
        self._enter(_S.COMPLETED)
        self._heard = self._destination.report_success()
        connection = self._destination.connection
        if not self._heard and connection.return_path is not None and not connection.from_migfw:
            self.warning = (
                f"{connection.channel.peer} may not know that the guest has arrived, and run it again: check that"
                " before it goes on here"
            )
            log.warning("%s", self.warning)

    def _fail(self, reason: str) -> str:
        """Returns what the source is told."""
        if self._destination.cancelled:
            end, reason = _S.CANCELLED, "it was cancelled on the destination"
        else:
            end, self.error = _S.FAILED, f"load of migration failed: {reason}"
            log.warning("%s", self.error)
        machine = self._destination.machine
        if isinstance(machine, RamMakingMachine):
            machine.discard_loaded()
        if self._destination.guest is None or not self._destination.guest.may_run:
            self._heard = self._destination.report_failure(reason)
        self._destination.abandon_loaders()
        self._enter(end)
        return reason

    def _enter(self, end: MigrationStatus) -> None:
        while (status := self._state.status) is not end:
            self._state.advance(status, end)
