"""The engine: what QMP, the command line and programs that embed migfw call.

Every command is checked before anything is started, and one that is refused changes nothing. The texts of errors are
QEMU's if it has any (7.2: qmp_migrate, migrate_prepare, qmp_migrate_incoming, qmp_migrate_continue, ...).

Threads: any may call these methods, and so may observers. Plugins, names and addresses are asked for before a lock is
taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

from corefw.channel import Transport
from corefw.control import CheckReport, MigrationControl, MigrationReport, PassBegan, RunStateChanged
from corefw.dispatch import Event, EventDispatcher, Observer
from corefw.engine.blockers import Blockers
from corefw.engine.checking import Check
from corefw.engine.guestlock import GuestLock
from corefw.engine.inbound import CLOSED, Inbound
from corefw.engine.launch import Launch
from corefw.engine.outgoing import OutgoingMigration
from corefw.engine.requirements import check_settings
from corefw.engine.source import Source
from corefw.engine.tails import tail_of
from corefw.errors import BlockedError, MigfwError, StateError, UriError, UsageError
from corefw.machine import DEAD, Machine, RunState, VerifiableMachine
from corefw.plugins import Plugins
from corefw.registry import SaverRegistry
from corefw.settings import Settings
from corefw.states import CONNECTED, IDLE, POSTCOPY, MigrationStatus, Side, StateMachine, StatusChanged

_S = MigrationStatus
MIGRATION_ACTIVE: Final = "There's a migration process in progress"
INCOMPLETE: Final = frozenset({_S.POSTCOPY_PAUSED, _S.POSTCOPY_RECOVER})
"""Statuses of a destination in which no page of the guest arrives."""
RESUME_WAIT: Final = 10.0
"""Seconds that a resumed migration has to leave postcopy-paused, so that the next query-migrate says how it goes. It
does at once, but for a host that is very busy."""
WAITS: Final = "Guest is waiting for an incoming migration"
MOVED: Final = "the guest has moved: the destination confirmed it"
ENDED: Final = frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLED})


class Engine(MigrationControl):
    """One guest, and what can be done with it. Raises UsageError under only-migratable if it cannot migrate."""

    def __init__(
        self,
        machine: Machine,
        plugins: Plugins,
        settings: Settings,
        *,
        name: str = "",
        autostart: bool = True,
        launch: Launch | None = None,
    ) -> None:
        self.name = name
        self.machine = machine
        self.settings = settings
        self.plugins: Final = plugins
        self.launch: Final = launch
        self._events = EventDispatcher()
        self.outgoing: Final = StateMachine(Side.SOURCE, self._events)
        self._closed = False
        self._lock = threading.RLock()  # held to begin a migration, or to change what one begins with
        self._swap = threading.Lock()  # `_migration` changes together with the status that is its own
        self._guest_lock = GuestLock(self._events)
        self._tail = tail_of(machine)
        self.inbound: Final = Inbound(machine, plugins, settings, self._events, self._guest_lock, lambda: autostart)
        self.incoming: Final = self.inbound.state
        self._blockers = Blockers(machine, plugins, settings, self._savers)
        self._migration: OutgoingMigration | None = None
        self._checking: Check | None = None
        if settings.property("only-migratable") and (reasons := self._blockers.found(self._savers())):
            raise UsageError("the guest cannot migrate, and only-migratable was asked for: " + "; ".join(reasons))
        self.observe(self._tell_plugins)
        machine.watch(lambda old, new: self._events.publish(RunStateChanged(old, new)))

    # -- events ----------------------------------------------------------------------------------------------------

    def observe(self, observer: Observer) -> Callable[[], None]:
        return self._events.observe(observer)

    def _tell_plugins(self, event: Event) -> None:
        if isinstance(event, StatusChanged):
            self.plugins.state_changed(event.side, event.old, event.new)

    def status(self, side: Side) -> MigrationStatus:
        return (self.outgoing if side is Side.SOURCE else self.incoming).status

    # -- the guest -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Pause the guest. Does nothing if it is not running. Raises StateError if it waits for a page that cannot come
        before a postcopy migration is recovered, MachineError."""
        with self._guest_lock.unless(self._check_pages_come):
            if self.machine.run_state is RunState.RUNNING:
                if self.incoming.status in INCOMPLETE and self.inbound.guest_waits():
                    self._check_pages_come()
                self.machine.stop(RunState.PAUSED)

    def cont(self) -> None:
        """Let the guest run. Raises StateError if it is not here yet, has ended, or has moved, which a destination has
        to have confirmed."""
        with self._guest_lock.unless(self._check_pages_come):
            state = self.machine.run_state
            if state is RunState.RUNNING:
                return
            self._check_is_ours()
            self._check_not_held()
            if state in DEAD:
                raise StateError(f"the guest has ended ({state})")
            self.machine.start()

    def verify(self) -> Mapping[str, object]:
        """Let the guest verify its own state. Raises UsageError if it cannot, MachineError if the state is wrong."""
        if not isinstance(self.machine, VerifiableMachine):
            raise UsageError(f"a machine of kind '{self.machine.kind}' cannot verify itself")
        with self._guest_lock.unless(self._check_pages_come):
            if self.machine.run_state is RunState.INMIGRATE:
                raise StateError(WAITS)
            self._check_not_held()
            self._check_pages_come()
            return self.machine.verify()

    def _check_pages_come(self) -> None:
        """Raise StateError if the guest's RAM is incomplete and nothing of it arrives: whatever waits for the guest
        might wait for ever."""
        if self.incoming.status in INCOMPLETE:
            raise StateError("a part of the guest's RAM is missing until the postcopy migration is recovered")

    def _check_is_ours(self) -> None:
        """Raise StateError if the guest is not here yet, or has moved."""
        if self._closed:
            raise StateError(CLOSED)
        if self.machine.run_state is RunState.INMIGRATE:
            raise StateError(WAITS)
        # No migration begins after one that moved the guest, so that one stays the last.
        if self._migration is not None and self._migration.confirmed:
            raise StateError(MOVED)
        if self._migration is not None and self._migration.released:
            raise StateError(
                "the guest cannot run or leave here again: its RAM was given back to the host as it arrived elsewhere"
                " (capability 'release-ram')"
            )

    def _check_is_whole(self) -> None:
        """Raise StateError if the guest runs here while its RAM is still arriving."""
        if self.incoming.status in POSTCOPY:
            raise StateError(f"The guest's RAM is still arriving in postcopy (status '{self.incoming.status}')")

    def _check_not_held(self) -> None:
        """Raise StateError if a migration has stopped the guest. Call it under the guest's lock."""
        if self._migration is not None and self._migration.holds_guest:
            if self.outgoing.status in POSTCOPY:
                raise StateError("the guest has left: in postcopy it runs on the destination")
            raise StateError("the guest is stopped for the switchover (cancel the migration to keep it running here)")

    @property
    def has_left(self) -> bool:
        """Whether the guest is known to be elsewhere: a destination has confirmed it, or it is whole in a file."""
        return self._migration is not None and self._migration.is_safe_elsewhere

    @property
    def has_part_of_guest(self) -> bool:
        """Whether the guest is in postcopy: a part of its RAM is here and the rest on the other side, so it is lost if
        either of them ends."""
        leaving = self._migration is not None and self._migration.has_part_of_guest
        return leaving or self.inbound.has_part_of_guest

    # -- out -------------------------------------------------------------------------------------------------------

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        """Start to send the guest away; returns once it has started (`wait_outgoing` for the end).

        Raises UsageError (and nothing was started): StateError, BlockedError, UriError, SettingsError.
        """
        if resume:
            self._resume(uri)
            return
        self._check_may_leave()
        transport = self._outgoing_transport(uri)
        savers = self._savers()
        found = self._blockers.found(savers)
        with self._events.hold(), self._lock:
            self._check_may_leave()
            check_settings(self.settings, transport)
            if reasons := self._blockers.added + found:
                raise BlockedError(reasons)
            self._end_check()  # a migration needs the dirty logs for itself
            self._begin_outgoing(transport, savers)

    def _resume(self, uri: str) -> None:
        self._check_paused()
        transport = self._outgoing_transport(uri)
        with self._lock:
            before = self.outgoing.changes
            migration = self._check_paused()
            migration.resume(transport)
        if not migration.asks():
            self.outgoing.wait_change(before, RESUME_WAIT)

    def _check_paused(self) -> OutgoingMigration:
        if self._migration is None or self.outgoing.status is not _S.POSTCOPY_PAUSED:
            raise StateError("Cannot resume if there is no paused migration")
        return self._migration

    def check(self, uri: str | None = None, *, postcopy: bool = False) -> CheckReport:
        """Find out whether a migration to `uri` would succeed, and what it would be like. It changes nothing and takes
        some seconds. Without `uri` only this side is checked. If a migration begins, the check ends. `postcopy` asks
        about postcopy too, as the capability postcopy-ram does.

        Raises StateError, UriError, PluginError.
        """
        self._check_may_check()
        transport = self.plugins.transport(uri, self.settings) if uri is not None else None
        if transport is not None:
            transport.check_outgoing()
        savers = self._savers()
        found = self._blockers.found(savers)
        with self._lock:
            self._check_may_check()
            reasons = self._blockers.added + found
            wanted = postcopy or self.settings.capability("postcopy-ram")
            self._checking = checking = Check(self.machine, self.settings, savers, reasons, postcopy=wanted)
        try:
            return checking.run(transport)
        finally:
            self._checking = None
            checking.done.set()

    def _end_check(self) -> None:
        if (checking := self._checking) is not None:
            checking.end()

    def _check_may_check(self) -> None:
        if self.outgoing.status not in IDLE:
            raise StateError(MIGRATION_ACTIVE)
        if self._checking is not None:
            raise StateError("a check is under way already")
        self._check_is_ours()
        self._check_is_whole()

    def _check_may_leave(self) -> None:
        """Raise StateError if no migration can begin, or if the guest may be running elsewhere: a second copy of it
        must not be started. A machine that cannot run here is only stored, and may be sent again."""
        if self.outgoing.status not in IDLE:
            raise StateError(MIGRATION_ACTIVE)
        self._check_is_ours()
        self._check_is_whole()
        if self.machine.run_state is RunState.POSTMIGRATE and not self._tail.may_leave_twice():
            raise StateError(
                "Can't migrate the vm that was paused due to previous migration"
                " ('cont' starts it, if you know that it does not run elsewhere)"
            )

    def _outgoing_transport(self, uri: str) -> Transport:
        if uri == "defer":
            raise UriError("'defer' is for a destination: expected the URI of one, as in tcp:HOST:PORT")
        transport = self.plugins.transport(uri, self.settings)
        transport.check_outgoing()
        check_settings(self.settings, transport)
        return transport

    def _begin_outgoing(self, transport: Transport, savers: SaverRegistry) -> None:
        source = Source(
            self.machine,
            self.settings,
            savers,
            transport,
            self._guest_lock,
            lambda number: self._events.publish(PassBegan(number)),
        )
        migration = OutgoingMigration(source, self.outgoing)
        with self._swap:
            self._migration = migration
            self.outgoing.advance(self.outgoing.status, _S.SETUP)
        try:
            migration.start()
        except RuntimeError as error:  # the host gives us no thread
            self.outgoing.advance(_S.SETUP, _S.FAILING)
            self.outgoing.advance(_S.FAILING, _S.FAILED)
            raise MigfwError(f"cannot start a migration: {error}") from None

    def _savers(self) -> SaverRegistry:
        """New savers for one migration."""
        return self._tail.savers(self.plugins.section_savers(self.machine, self.settings))

    def wait_outgoing(self, seconds: float | None = None) -> MigrationStatus:
        """Block until the present migration has ended, or for `seconds`; returns its status."""
        self.outgoing.wait(ENDED, seconds)
        return self.outgoing.status

    def cancel(self) -> None:
        """Begin to cancel the migration, on either side. Does nothing if there is none.

        A destination gives up the connection that it loads from, tells that source, and stops waiting; migrate_incoming
        lets it wait again. A guest that has arrived stays. Raises StateError in postcopy: neither side has
        the whole guest then (QEMU 10.1, qmp_migrate_cancel).
        """
        with self._events.hold(), self._swap:
            migration = self._migration
            begun = migration is not None and migration.begin_to_cancel()
        if migration is not None and begun:
            migration.interrupt()
        self.inbound.cancel()

    def continue_migration(self, state: MigrationStatus) -> None:
        """Continue from pre-switchover. Raises StateError if the status is not `state`."""
        status = self.outgoing.status
        if status is not state or status is not _S.PRE_SWITCHOVER or self._migration is None:
            raise StateError(f"Migration not in expected state: {status}")
        self._migration.proceed()

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as what the guest needs to start has been sent. Raises StateError."""
        if not self.settings.capability("postcopy-ram") and not self.settings.capability("dirty-bitmaps"):
            raise StateError("Enable postcopy with migrate_set_capability before the start of migration")
        if self._migration is None or self.outgoing.status in IDLE:
            raise StateError("Postcopy must be started after migration has been started")
        self._migration.start_postcopy()

    def pause_migration(self) -> None:
        """Break the connection of a postcopy on purpose, on either side. Raises StateError."""
        leaving = self._migration if self.outgoing.status in CONNECTED else None
        if not (self.inbound.pause() if leaving is None else leaving.pause()):
            raise StateError("migrate-pause is currently only supported during postcopy-active state")

    def recover(self, uri: str) -> str:
        """On a destination whose postcopy is paused: wait for the source at another address, or the same; returns the
        URI that it has to dial. If the postcopy has ended, the source is told how. Raises UriError, StateError,
        PluginError, ChannelError."""
        return self.inbound.recover_at(uri)

    # -- in --------------------------------------------------------------------------------------------------------

    def migrate_incoming(self, uri: str, *, exit_on_error: bool = True) -> str:
        """Begin to wait for a source; the URI that it has to dial. Raises UsageError, PluginError, ChannelError.

        A destination that waits already, or is loading, is cancelled first: this is the address from now on.
        `exit_on_error` says whether the process that hosts this engine ends when the guest cannot be loaded.
        """
        return self.inbound.wait_at(uri, exit_on_error=exit_on_error)

    def wait_incoming(self, seconds: float | None = None) -> MigrationStatus:
        """Block until the guest has arrived or failed to, or for `seconds`; returns the status."""
        self.incoming.wait(ENDED, seconds)
        return self.incoming.status

    # -- settings and blockers -------------------------------------------------------------------------------------

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """Switch capabilities, all of them or none. Raises StateError while a migration runs, SettingsError."""
        with self._lock:
            if self.outgoing.status not in IDLE:
                raise StateError(MIGRATION_ACTIVE)
            self.settings.set_capabilities(changes)

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Change parameters, all of them or none; also while a migration runs. Raises SettingsError."""
        self.settings.set_parameters(changes)
        if self._migration is not None:
            self._migration.limits_changed()

    def add_blocker(self, reason: str) -> None:
        """Refuse migrations for this reason. Raises StateError while one runs, UsageError under only-migratable."""
        with self._lock:
            self._blockers.add(reason, migrating=self.outgoing.status not in IDLE)

    def remove_blocker(self, reason: str) -> None:
        self._blockers.remove(reason)

    # -- what is known ---------------------------------------------------------------------------------------------

    def report(self) -> MigrationReport:
        with self._swap:
            migration, status = self._migration, self.outgoing.status
        blocked = tuple(self._blockers.recent()) if self.outgoing.status in IDLE else ()
        if migration is not None and status is not _S.NONE:
            found = migration.statistics
            sections = found.section_reports()
            return MigrationReport(Side.SOURCE, status, found.error, blocked, sections, found.report(status))
        return self.inbound.report(blocked)

    def close(self) -> None:
        """End migrations and the guest. A source that may have handed the guest over does not start it again."""
        with self._lock:
            self._closed = True
            self._end_check()
        with self._events.hold(), self._swap:
            migration = self._migration
            begun = migration is not None and migration.begin_to_close()
        if migration is not None:
            if begun:
                migration.interrupt()
            migration.join()
        self.inbound.close()
        self.machine.close()
