"""The state of one incoming migration, shared by its phases; to loaders, the context that setup() is given.

Threads: the incoming thread, unless a method says otherwise.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from corefw.channel import Channel, Interrupt, Listener
from corefw.engine.blocktime import Blocktime
from corefw.engine.connection import Connection
from corefw.engine.custody import tell_outcome
from corefw.engine.guestarrival import GuestArrival
from corefw.engine.guestlock import GuestLock
from corefw.engine.outcome import Outcome
from corefw.engine.preempt import CAPABILITY as PREEMPT
from corefw.engine.preempt import RequestedReceiver
from corefw.engine.progress import LoadProgress
from corefw.engine.readmission import Readmission, Relisten
from corefw.engine.standby import ArrivalThreads
from corefw.engine.statistics import section_figures
from corefw.engine.strays import StrayChannels
from corefw.engine.switchover import SwitchoverAck
from corefw.engine.tails import tail_of
from corefw.errors import ANYTHING, ChannelError, MigfwError, StateError
from corefw.machine import FaultSource, Machine
from corefw.memory.preallocation import Preallocation
from corefw.registry import LoaderRegistry
from corefw.section import IncomingContext, SectionLoader
from corefw.settings import Settings
from corefw.states import IN_POSTCOPY, MigrationStatus
from corefw.wire.frames import FrameReader
from corefw.wire.records import CommandRecord

log = logging.getLogger(__name__)


class Destination(IncomingContext):
    """One attempt to take a guest in.

    frames                the frame of the stream
    progress              what has been loaded
    preallocation         allocates the guest's RAM until a source connects
    commands              the handlers of stream commands, by number (commands.py)
    stream_capabilities   see IncomingContext
    accepts_again         the listener can give more than one connection
    advised               the source may switch to postcopy
    advised_pages         so that pages of RAM follow
    cancelled             the user has ended it
    secret                what the source knows of this migration (identity.py); None if it is a QEMU
    readmission           waits for the source to come back, in postcopy
    resuming              a source has connected again, and has not sent POSTCOPY_RESUME yet
    guest                 the guest that runs while its RAM is still arriving; None before, and in precopy
    watched               where that guest's page faults are read, from the first RAM_DISCARD on
    threads               what that guest will need, from POSTCOPY_ADVISE on
    blocktime             how long that guest waits for pages; None without the capability postcopy-blocktime
    """

    frames: FrameReader
    commands: Mapping[int, Callable[[Destination, FrameReader, CommandRecord], MigrationStatus | None]]

    def __init__(
        self,
        machine: Machine,
        settings: Settings,
        loaders: LoaderRegistry,
        listener: Listener,
        guest_lock: GuestLock,
        autostart: Callable[[], bool],
        *,
        relisten: Relisten | None,
    ) -> None:
        self.machine = machine
        self.settings = settings
        self.loaders = loaders
        self.listener = listener
        self.guest_lock = guest_lock
        self.autostart = autostart
        self.accepts_again = relisten is not None
        self.interrupt = Interrupt()
        self.secret: bytes | None = None
        self.readmission = Readmission(settings, self.interrupt, self._requested, self._abort_connection)
        self.stream_capabilities = frozenset()
        self.tail = tail_of(machine)
        self.progress = LoadProgress(loaders)
        self.preallocation = Preallocation(machine.ram_blocks())
        self.switchover_ack: SwitchoverAck | None = None
        self.advised = False
        self.advised_pages = False
        self.cancelled = False
        self.resuming = False
        self.why_paused: str | None = None
        self._broken_on_purpose = False
        self.guest: GuestArrival | None = None
        self.watched: FaultSource | None = None
        self.threads: ArrivalThreads | None = None
        self.blocktime: Blocktime | None = None
        self._deciding = threading.Lock()  # guards the two that decide between a cancel and RUN
        self._taken_over = False
        self._connection: Connection | None = None
        self._relisten = relisten
        self._strays: StrayChannels | None = None
        self._returning = threading.Lock()  # guards the next, and a change of who accepts connections
        self._expects_return = False
        self._set_up: list[SectionLoader] = []
        self._to_clean_up: list[SectionLoader] = []

    # -- connections -----------------------------------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        """The present one; only once a source has connected."""
        assert self._connection is not None, "no source has connected"
        return self._connection

    def accept(self) -> Connection:
        """Wait for the next one, which becomes `connection`. Raises ChannelError, Interrupted."""
        return self._adopt(Connection(self.listener.accept(self.interrupt), self.settings, self.interrupt))

    def _adopt(self, connection: Connection) -> Connection:
        if self.settings.capability(PREEMPT):
            connection.requested = RequestedReceiver(self._refuse_requested)
        self._connection = connection
        self.interrupt.check()
        return connection

    def allocate_ram(self) -> None:
        """Begin to allocate the guest's RAM, which ends when a source connects. From any thread; does not raise."""
        if self.settings.boolean("x-migfw-prealloc"):
            self.preallocation.start()

    def hang_up(self) -> None:
        """Close the present connection: it brought no migration."""
        connection, self._connection = self.connection, None
        connection.close()

    def turn_others_away(self) -> None:
        """Close every further connection but the channel of requested pages; a source that opens channels for multifd
        fails the migration."""
        connection = self.connection
        self._strays = StrayChannels(self.settings, self.listener, connection.requested, self.secret, connection.abort)

    def stop_listening(self) -> None:
        """Idempotent; does not raise."""
        with self._returning:
            self._expects_return = True  # no more
            if self._strays is not None:
                self._strays.close()
        self.readmission.close()
        self.listener.close()

    def expect_return(self, *, paused: bool = False) -> None:
        """In postcopy: wait for the source to come back, over another connection. Called once the guest has started, by
        the thread that starts it, and by the incoming thread when the migration is `paused`, which may be earlier."""
        with self._returning:
            if self._expects_return and not paused:
                return
            self._expects_return = True
            if self._strays is not None:
                self._strays.stop()
                self._strays = None
                if self._relisten is not None:
                    self.readmission.inherit(self.listener, self._relisten)
                else:
                    self.listener.close()
            self.readmission.begin(self.secret, paused=paused)

    def readmit(self) -> Connection:
        """In a postcopy that is paused: wait until the source has come back. Raises Interrupted, and ChannelError for a
        connection over which a migration cannot go on."""
        self.interrupt.check()
        self._broken_on_purpose = False
        connection = self._adopt(self.readmission.await_source())
        connection.open_return_path()
        return connection

    def _requested(self) -> RequestedReceiver | None:
        """What reads the requested pages of the present connection, if they have a channel of their own."""
        connection = self._connection
        return connection.requested if connection is not None else None

    def _abort_connection(self) -> None:
        """Of one that breaks, or has broken without having been noticed."""
        if (connection := self._connection) is not None:
            connection.abort()

    def take_over(self) -> None:
        """In postcopy, at RUN: the guest is this side's from here on, and a cancel is refused. Raises Interrupted if
        one came before."""
        with self._deciding:
            self.interrupt.check()
            self._taken_over = True

    @property
    def has_taken_over(self) -> bool:
        """Whether take_over() was called: the source does not start the guest unless it hears that it is not here."""
        return self._taken_over

    def outcome(self, problem: str, *, heard: bool) -> Outcome | None:
        """What a source is told that missed how its postcopy ended; None if it can know otherwise. `problem`: why the
        guest is not here, empty if it is. `heard`: it is known not to have missed it."""
        if self.secret is None:  # it is given with the advice
            return None
        relisten = self.readmission.relisten or self._relisten
        return Outcome(self.settings, self.secret, problem, None if heard else relisten)

    def cause(self, error: MigfwError) -> MigfwError:
        """The error to report: what comes over another channel aborts the stream, and the error that follows says
        little."""
        if self._broken_on_purpose:
            return ChannelError("its connection was closed by migrate-pause")
        try:
            if (strays := self._strays) is not None:
                strays.check()
            if self._connection is not None and self._connection.requested is not None:
                self._connection.requested.check()
        except MigfwError as first:
            return first
        return error

    # -- from any thread -------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """End the migration, wherever it is, without telling the source."""
        self.interrupt.set()
        self.readmission.end()
        if (connection := self._connection) is not None:
            connection.abort()

    def cancel(self) -> None:
        """End the migration, wherever it is; the connection stays usable to tell the source. Raises StateError after
        take_over()."""
        with self._deciding:
            if self._taken_over:
                raise StateError(IN_POSTCOPY)
            self.cancelled = True
            self.interrupt.set()
        self.interrupt_load()

    def interrupt_load(self) -> None:
        """End the migration, wherever it is; the connection stays usable to tell the source."""
        self.interrupt.set()
        self.readmission.end()
        if (connection := self._connection) is not None:
            connection.abort_others()

    def _refuse_requested(self) -> None:
        """What came over the channel of requested pages cannot be loaded. Before RUN that ends the migration, and the
        source is told why; later it pauses."""
        with self._deciding:
            if not self._taken_over:
                self.interrupt.set()
        if self.interrupt.is_set():
            self.interrupt_load()
        else:
            self._abort_connection()

    def break_connection(self) -> None:
        """Pause a postcopy on purpose. The source cannot come back before migrate-recover."""
        self._broken_on_purpose = True
        self.readmission.suspend()
        self._abort_connection()

    # -- for the loaders -------------------------------------------------------------------------------------------

    def accept_channel(self) -> Channel:
        """See IncomingContext."""
        return self.connection.accept_channel(self.readmission.listener or self.listener)

    def send_return_message(self, message: int, body: bytes) -> None:
        """From any thread. Raises ChannelError."""
        connection = self._connection
        if connection is None or (path := connection.return_path) is None:
            raise ChannelError("there is no return path to the source at present")
        path.send(message, body)

    def figures(self) -> dict[str, dict[str, object]]:
        """The loaders' statistics by section. From any thread."""
        return section_figures(self._set_up)

    # -- the life of the loaders -----------------------------------------------------------------------------------

    def set_loaders_up(self) -> None:
        """Call setup() of every loader. Raises what one raises; those whose setup() was called, that one included, are
        still cleaned up and told the outcome."""
        for loader in self.loaders:
            self._set_up.append(loader)
            self._to_clean_up.append(loader)
            loader.setup(self)

    def clean_loaders_up(self) -> None:
        """Run every loader's cleanup, even if one fails, once no thread asks one for a page. Idempotent."""
        if self._connection is not None and self._connection.requested is not None:
            self._connection.requested.close()
        if self.guest is not None:
            self.guest.close()
        elif self.watched is not None:
            self.watched.release()
        if self.threads is not None:
            self.threads.dismiss()
        while self._to_clean_up:
            loader = self._to_clean_up.pop(0)
            try:
                loader.cleanup()
            except ANYTHING:
                log.exception("section %s: cleanup failed", loader.key)

    def commit_loaders(self) -> None:
        """The guest is ours."""
        tell_outcome(self._set_up, committed=True)

    def abandon_loaders(self) -> None:
        """The guest is not ours."""
        tell_outcome(self._set_up, committed=False)

    # -- the end ---------------------------------------------------------------------------------------------------

    def report_success(self) -> bool:
        """Tell the source that the guest is here; whether it is known to have heard."""
        return self.connection.report_success()

    def report_failure(self, reason: str) -> bool:
        """Tell the source, if one has connected, that the guest is not here, and why; whether it is known to have
        heard."""
        return self._connection is not None and self._connection.report_failure(reason)

    def close(self) -> None:
        """Close every channel."""
        self.preallocation.close()
        if self._connection is not None:
            self._connection.close()
