"""The engine's side of incoming migrations: at most one destination that waits or loads, and what replaces it.

Commands are checked before anything is started; the errors' texts are QEMU's (qmp_migrate_incoming, 7.2). Names are
resolved and addresses listened at before the lock is taken. Threads: any.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from corefw.channel import Listener, Transport
from corefw.control import AllocationReport, MigrationReport
from corefw.dispatch import EventDispatcher
from corefw.engine.coverage import uncovered
from corefw.engine.destination import Destination
from corefw.engine.guestlock import GuestLock
from corefw.engine.incoming import IncomingMigration
from corefw.engine.preempt import check_channels
from corefw.engine.readmission import Relisten
from corefw.engine.tails import tail_of
from corefw.errors import BlockedError, ChannelError, MigfwError, StateError, UriError
from corefw.machine import Machine, RunState
from corefw.plugins import Plugins
from corefw.registry import LoaderRegistry
from corefw.settings import Settings
from corefw.states import CONNECTED, IN_POSTCOPY, POSTCOPY, MigrationStatus, Side, StateMachine

_S = MigrationStatus
CLOSED: Final = "the engine is closed"
RELEASE: Final = 2.0
"""Seconds that a transport may take to give up an address."""
ARRIVING: Final = frozenset({_S.SETUP, _S.ACTIVE})


class Inbound:
    """The incoming migrations of one engine.

    state           the destination's status
    uri             what a source dials; None before the engine waits
    exit_on_error   whether the process that hosts the engine ends when the guest cannot be loaded
    """

    def __init__(
        self,
        machine: Machine,
        plugins: Plugins,
        settings: Settings,
        events: EventDispatcher,
        guest_lock: GuestLock,
        autostart: Callable[[], bool],
    ) -> None:
        self.state: Final = StateMachine(Side.DESTINATION, events)
        self.uri: str | None = None
        self.exit_on_error = True
        self._machine = machine
        self._plugins = plugins
        self._settings = settings
        self._events = events
        self._guest_lock = guest_lock
        self._autostart = autostart
        self._lock = threading.Lock()  # held to begin to wait
        self._closed = False
        self._present: IncomingMigration | None = None

    def wait_at(self, uri: str, *, exit_on_error: bool) -> str:
        """Begin to wait for a source; the URI that it has to dial. See Engine.migrate_incoming."""
        transport = self._plugins.transport(uri, self._settings)
        transport.check_incoming()  # a wrong URI cancels nothing
        check_channels(self._settings, transport)
        self._cancel_present()
        self._check_may_wait()
        loaders = tail_of(self._machine).loaders(self._plugins.section_loaders(self._machine, self._settings))
        if missing := uncovered(self._machine, loaders):
            raise BlockedError(missing)
        listener = transport.listen()
        try:
            with self._events.hold(), self._lock:
                self._check_may_wait()
                self.exit_on_error = exit_on_error
                self._begin(listener, loaders, self._relisten(transport, listener))
        except MigfwError:
            listener.close()
            raise
        return str(listener.uri)

    def _check_may_wait(self) -> None:
        if self._closed:
            raise StateError(CLOSED)
        if self._machine.run_state is not RunState.INMIGRATE:
            raise StateError("'-incoming' was not specified on the command line")
        if self.state.status not in (_S.NONE, _S.CANCELLED, _S.FAILED):
            raise StateError("The incoming migration has already been started")

    def _begin(self, listener: Listener, loaders: LoaderRegistry, relisten: Relisten | None) -> None:
        destination = Destination(
            self._machine,
            self._settings,
            loaders,
            listener,
            self._guest_lock,
            self._autostart,
            relisten=relisten,
        )
        self._present = arrival = IncomingMigration(destination, self.state)
        self.uri = str(listener.uri)
        self.state.advance(self.state.status, _S.SETUP)
        try:
            arrival.start()
        except RuntimeError as error:  # the host gives us no thread
            self._present = None
            self.state.advance(_S.SETUP, _S.FAILED)
            raise MigfwError(f"cannot listen for a migration: {error}") from None

    def _cancel_present(self) -> None:
        """Cancel the present migration, if any, and wait until it has ended. Not under the lock: observers of its end
        may need it."""
        if self._closed or self._machine.run_state is not RunState.INMIGRATE:
            return
        self.cancel()
        if self._present is not None:
            self._present.close()

    def cancel(self) -> IncomingMigration | None:
        """Begin to cancel the present migration, and return it; None if there is none, or if it has ended. Raises
        StateError in postcopy."""
        if self.state.status in POSTCOPY:
            raise StateError(IN_POSTCOPY)
        arrival = self._present
        if arrival is None or self.state.status not in ARRIVING:
            return None
        arrival.cancel()
        return arrival

    def pause(self) -> bool:
        """Break the connection of a postcopy on purpose; False if none is under way."""
        if self._present is None or self.state.status not in CONNECTED:
            return False
        return self._present.pause()

    @property
    def has_part_of_guest(self) -> bool:
        """Whether the guest is here while a part of its RAM is still on the source."""
        return self._present is not None and self._present.has_part_of_guest

    def guest_waits(self) -> bool:
        """Whether the guest waits for a page that has not arrived."""
        return self._present is not None and self._present.guest_waits()

    def recover_at(self, uri: str) -> str:
        """Have a postcopy that is paused, or has ended, wait for its source. See Engine.recover."""
        transport = self._plugins.transport(uri, self._settings)
        transport.check_incoming()
        if not transport.features.return_path:
            raise UriError(f"'{transport.uri}': '{transport.uri.scheme}:' has no return path, which postcopy needs")
        check_channels(self._settings, transport)
        readmission = self._check_paused().readmission
        readmission.suspend()  # the address may be the one at which it listens already
        try:
            listener = self._listen_again(transport)
            try:
                with self._events.hold(), self._lock:
                    self._check_paused()
                    readmission.listen_at(listener, self._relisten(transport, listener))
                    self.uri = str(listener.uri)
            except MigfwError:
                listener.close()
                raise
        except MigfwError:
            readmission.resume()
            raise
        return str(listener.uri)

    def _listen_again(self, transport: Transport) -> Listener:
        """Listen. An address at which the destination has listened until just now may take a moment to become free."""
        deadline = time.monotonic() + (RELEASE if str(transport.uri) == self.uri else 0.0)
        while True:
            try:
                return transport.listen()
            except ChannelError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(RELEASE / 40)

    def _relisten(self, transport: Transport, listener: Listener) -> Relisten | None:
        """Listens again where `listener` did; None if only one connection can come there."""
        if not transport.features.multi_channel:
            return None
        uri = str(listener.uri)
        return lambda: self._plugins.transport(uri, self._settings).listen()

    def _check_paused(self) -> IncomingMigration:
        present = self._present
        if present is None or not (self.state.status is _S.POSTCOPY_PAUSED or present.tells_outcome):
            raise StateError("Migrate recover can only be run when postcopy is paused.")
        return present

    @property
    def owes_outcome(self) -> bool:
        """The guest could not be started after RUN, and the source may not have heard that: it does not start the guest
        before it has."""
        return self._present is not None and self._present.owes_outcome

    def preallocation(self) -> AllocationReport | None:
        """How much of the RAM is allocated for the guest that is waited for; None if none is."""
        arrival = self._present
        return arrival.preallocation() if arrival is not None and self.state.status in ARRIVING else None

    def report(self, blocked_reasons: tuple[str, ...]) -> MigrationReport:
        """How the present migration goes, or the last one went."""
        arrival, status = self._present, self.state.status
        if arrival is None:
            return MigrationReport(Side.DESTINATION, status, blocked_reasons=blocked_reasons)
        return MigrationReport(
            Side.DESTINATION,
            status,
            arrival.problem,
            blocked_reasons,
            arrival.figures(),
            blocktime=arrival.blocktime(),
            warning=arrival.warning,
        )

    def close(self) -> None:
        """Abort the present migration and wait for its end; none begins afterwards."""
        with self._lock:
            self._closed = True
        if self._present is not None:
            self._present.abort()
            self._present.close()
