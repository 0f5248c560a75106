"""One outgoing migration: the thread that runs its phases, how it is cancelled, and how it ends.

However it ends, custody first decides what becomes of the guest, then everything is closed, then the status changes:
who sees the end sees the guest as it will stay.

Source: QEMU 10.0, migration_thread, migration_cancel, migration_iteration_finish, migrate_fd_cleanup.
Threads: one of its own; the public methods may be called from any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from corefw.channel import Transport
from corefw.engine import postcopy, precopy, recovery
from corefw.engine.custody import tell_outcome
from corefw.engine.phases import run_phases
from corefw.engine.source import Source
from corefw.engine.statistics import OutgoingStatistics
from corefw.errors import ANYTHING, ChannelError, Interrupted, MachineError, MigfwError, StateError
from corefw.states import IDLE, IN_POSTCOPY, POSTCOPY, SETUP_OR_ACTIVE, MigrationStatus, StateMachine

log = logging.getLogger(__name__)

_S = MigrationStatus

PHASES: Final[Mapping[MigrationStatus, Callable[[Source], MigrationStatus]]] = {
    _S.SETUP: precopy.set_up,
    _S.ACTIVE: precopy.send_passes,
    _S.PRE_SWITCHOVER: precopy.await_continue,
    _S.DEVICE: precopy.switch_over,
    _S.POSTCOPY_ACTIVE: postcopy.send_rest,
    _S.POSTCOPY_PAUSED: recovery.await_resume,
    _S.POSTCOPY_RECOVER_SETUP: recovery.reconnect,
    _S.POSTCOPY_RECOVER: recovery.recover,
}
"""The phase of each status. To add one, write a function and give it a row; SOURCE_TRANSITIONS has to allow the status
changes that it makes.

A phase may be entered again: Source keeps what has to outlive it, and Source.link what belongs to the connection. It
raises MigfwError to end the migration. A phase that can go on over a new connection catches ChannelError itself and
returns the status in which the migration is paused; its successor puts a new Link into Source.link.
"""


class OutgoingMigration:
    """Sends the guest away: runs the phases of a source."""

    def __init__(self, source: Source, state: StateMachine) -> None:
        self._source = source
        self._state = state
        self._thread = threading.Thread(target=self._run, name="migration", daemon=True)

    # -- from other threads ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Raises RuntimeError if the host gives no thread; then nothing was started."""
        limits = self._source.limits
        watch = partial(
            limits.watch,
            abort=self._source.abort,
            can_switch_over=lambda: self._state.status is not _S.SETUP,
            longest_send=self._source.meter.longest_send,
        )
        threading.Thread(target=watch, name="limits", daemon=True).start()
        try:
            self._thread.start()
        except RuntimeError:
            limits.end()
            raise

    def asks(self) -> bool:
        """Whether the caller is its own thread (in an observer), which must not wait for it."""
        return self._thread is threading.current_thread()

    def join(self) -> None:
        """Wait until nothing of it goes on, unless its own thread asks."""
        if not self.asks():
            self._thread.join()

    @property
    def statistics(self) -> OutgoingStatistics:
        return self._source.statistics

    @property
    def confirmed(self) -> bool:
        """Whether the destination said that it has the guest."""
        return self._source.confirmed

    @property
    def released(self) -> bool:
        """Whether some of the guest's memory was given back to the host, so that it cannot run here again."""
        return self._source.released

    @property
    def is_safe_elsewhere(self) -> bool:
        """Whether it is known that the guest is elsewhere, whole: the destination said so, or a file has it."""
        return self.confirmed or (self._state.status is _S.COMPLETED and self._arrived())

    @property
    def has_part_of_guest(self) -> bool:
        """Whether the guest runs on the destination, or is about to, while a part of its RAM is still here."""
        return self._state.status in POSTCOPY and bool(self._source.on_demand())

    @property
    def holds_guest(self) -> bool:
        """Whether it has stopped the guest and not decided yet what becomes of it, so that nothing else may start it.
        To be asked under the guest lock."""
        return self._source.custody.held and self._state.status not in IDLE

    def begin_to_cancel(self) -> bool:
        """Enter cancelling; interrupt() has to follow. False if there is nothing to cancel any more. Raises StateError
        in postcopy (see `_may_cancel`). The caller makes sure that no other migration begins meanwhile."""
        while (status := self._state.status) in SETUP_OR_ACTIVE:
            if not self._may_cancel(status):
                raise StateError(IN_POSTCOPY)
            if self._state.advance(status, _S.CANCELLING):
                return True
        return False

    def begin_to_close(self) -> bool:
        """The same for an engine that ends, in postcopy too."""
        while (status := self._state.status) in SETUP_OR_ACTIVE:
            if self._state.advance(status, _S.CANCELLING):
                return True
        return False

    def interrupt(self) -> None:
        """Wake the migration thread wherever it waits. With no lock held: channels belong to plugins."""
        self._source.cancel()

    def _may_cancel(self, status: MigrationStatus) -> bool:
        """Whether a cancel in this status leaves a whole guest somewhere. In postcopy it would not; but if the
        destination never confirmed that it has the device state, it may have failed to load that, and then the guest is
        whole here."""
        if status is _S.POSTCOPY_PAUSED:
            return not self._source.started_there
        return status not in POSTCOPY

    def proceed(self) -> None:
        """Go on from pre-switchover (migrate-continue)."""
        self._source.proceed.set()

    def limits_changed(self) -> None:
        """A parameter has been set: let waits for the old limit look at the new one."""
        self._source.settings_changed()

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as the guest can (migrate-start-postcopy). Raises StateError if there is no return
        path: the destination could not ask for pages, nor say that it could not start the guest."""
        transport = self._source.link.transport
        if not transport.features.return_path:
            raise StateError(f"'{transport.uri}' has no return path, which postcopy needs")
        self._source.postcopy.request()

    def pause(self) -> bool:
        """Break the connection of a postcopy on purpose (migrate-pause); False if it could not be replaced, because
        only dirty bitmaps follow the guest."""
        if not self._source.on_demand():
            return False
        self._source.link.pause()
        return True

    def resume(self, transport: Transport) -> None:
        """Go on from postcopy-paused over another connection (migrate with resume). Raises StateError if it is about
        to."""
        self._source.resume(transport)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        source = self._source
        error: MigfwError | None = None
        try:
            if run_phases(self._state, PHASES, source) is not _S.COMPLETED:
                raise Interrupted("cancelled")  # before the first phase
        except MigfwError as caught:
            error = caught
        except ANYTHING as bug:
            log.exception("the migration thread failed")
            error = MigfwError(f"internal error: {type(bug).__name__}: {bug}")
        source.limits.end()
        if error is not None:
            error = self._break_off(error)
        if error is None:
            source.statistics.finish(downtime=source.downtime(), guest=self._whereabouts())
            source.custody.let_go()
        else:
            self._begin_to_fail()
            source.statistics.fail(str(error) + source.custody.take_back(refused=source.refused))
        self._clean_up()
        tell_outcome([*source.live, *source.savers.state()], committed=error is None and self._arrived())
        self._end(_S.COMPLETED if error is None else _S.FAILED)

    def _arrived(self) -> bool:
        """Whether it is known, after the migration has completed, that the guest is elsewhere."""
        return self.confirmed or self._source.link.transport.features.atomic

    def _whereabouts(self) -> str:
        """Where the guest is after the migration has completed, for query-migrate's x-migfw.guest."""
        if not self._arrived():
            return "unconfirmed"
        return "moved" if self.confirmed else "stored"

    # -- how it ends -----------------------------------------------------------------------------------------------

    def _break_off(self, error: MigfwError) -> MigfwError | None:
        """Let nothing more reach the destination. What failed first; None if it turns out that the destination has the
        guest."""
        source, link = self._source, self._source.link
        if isinstance(error, ChannelError) and not source.interrupt.is_set():
            link.await_last_words()
        if link.return_path is not None and link.return_path.refused:
            link.part()
        else:
            link.abort()
        if link.return_path is not None:
            link.return_path.join()
            if link.return_path.accepted:
                source.confirmed = True
                return None
        return self._cause(error)

    def _cause(self, error: MigfwError) -> MigfwError:
        """What failed first. A guest that dies makes reading its dirty logs fail, and a return path that breaks aborts
        the channels: the errors that follow from these say little."""
        source = self._source
        try:
            source.check_guest()
        except MachineError as first:
            return first
        if source.limits.cancelled:
            return MigfwError(f"{source.limits.reason}; {source.statistics.progress()}")
        if not source.interrupt.is_set():
            try:
                source.link.check()
            except Interrupted:
                pass  # that was our own abort
            except MigfwError as first:
                return first
        return error

    def _clean_up(self) -> None:
        """Run every cleanup step even if one fails."""
        for saver in self._source.live:
            try:
                saver.cleanup()
            except ANYTHING:
                log.exception("section %s: cleanup failed", saver.key)
        self._source.link.close()

    def _begin_to_fail(self) -> None:
        """Enter failing, unless the migration was cancelled; it cannot be cancelled from now on."""
        while (now := self._state.status) not in (_S.CANCELLING, _S.FAILING):
            self._state.advance(now, _S.FAILING)

    def _end(self, status: MigrationStatus) -> None:
        """Enter the last status. A cancel that comes in between turns a failure into `cancelled`, but not a guest that
        the destination has."""
        while True:
            now = self._state.status
            end = _S.CANCELLED if status is _S.FAILED and now is _S.CANCELLING else status
            if self._state.advance(now, end):
                break
        if self.statistics.error is not None:
            log.warning("migration %s: %s", end, self.statistics.error)
