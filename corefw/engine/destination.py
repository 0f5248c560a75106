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
from corefw.engine.preempt import CAPABILITY as PREEMPT
from corefw.engine.preempt import RequestedReceiver
from corefw.engine.progress import LoadProgress
from corefw.engine.statistics import section_figures
from corefw.engine.strays import StrayChannels
from corefw.engine.switchover import SwitchoverAck
from corefw.engine.tails import tail_of
from corefw.errors import ANYTHING, ChannelError, MigfwError, StateError
from corefw.machine import Machine
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
    cancelled             the user has ended it
    resuming              a source has connected again, and has not sent POSTCOPY_RESUME yet
    guest                 the guest that runs while its RAM is still arriving; None before, and in precopy
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
        accepts_again: bool,
    ) -> None:
        self.machine = machine
        self.settings = settings
        self.loaders = loaders
        self.listener = listener
        self.guest_lock = guest_lock
        self.autostart = autostart
        self.accepts_again = accepts_again
        self.interrupt = Interrupt()
        self.stream_capabilities = frozenset()
        self.tail = tail_of(machine)
        self.progress = LoadProgress(loaders)
        self.preallocation = Preallocation(machine.ram_blocks())
        self.switchover_ack: SwitchoverAck | None = None
        self.advised = False
        self.cancelled = False
        self.resuming = False
        self.guest: GuestArrival | None = None
        self.blocktime: Blocktime | None = None
        self._deciding = threading.Lock()  # guards the two that decide between a cancel and RUN
        self._taken_over = False
        self._connection: Connection | None = None
        self._recovering = threading.Event()
        self._strays: StrayChannels | None = None
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
        self._connection = Connection(self.listener.accept(self.interrupt), self.settings, self.interrupt)
        if self.settings.capability(PREEMPT):
            self._connection.requested = RequestedReceiver(self._refuse_requested)
        self.interrupt.check()
        return self._connection

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
        self._strays = StrayChannels(self.listener, self.connection.take_channel, self.connection.abort)

    def stop_listening(self) -> None:
        """Idempotent; does not raise."""
        if self._strays is not None:
            self._strays.stop()
        self.listener.close()
        self._recovering.clear()

    def await_listener(self) -> None:
        """In a postcopy that is paused: wait for listen_again(). Raises Interrupted."""
        self.interrupt.check()  # stop_listening() may have cleared what abort() had set
        self._recovering.wait()
        self.interrupt.check()

    def take_over(self) -> None:
        """In postcopy, at RUN: the guest is this side's from here on, and a cancel is refused. Raises Interrupted if
        one came before."""
        with self._deciding:
            self.interrupt.check()
            self._taken_over = True

    def cause(self, error: MigfwError) -> MigfwError:
        """The error to report: what comes over another channel aborts the stream, and the error that follows says
        little."""
        try:
            if self._strays is not None:
                self._strays.check()
            if self._connection is not None and self._connection.requested is not None:
                self._connection.requested.check()
        except MigfwError as first:
            return first
        return error

    # -- from any thread -------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """End the migration, wherever it is, without telling the source."""
        self.interrupt.set()
        self._recovering.set()
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
        self._recovering.set()
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
            self.break_connection()

    def listen_again(self, listener: Listener) -> None:
        """In a postcopy that is paused: this listener will bring the source. Raises StateError if another one waits."""
        if self._recovering.is_set():
            raise StateError("Migrate recovery is triggered already")
        self.listener = listener
        self._recovering.set()

    def break_connection(self) -> None:
        """Pause a postcopy on purpose."""
        if (connection := self._connection) is not None:
            connection.abort()

    # -- for the loaders -------------------------------------------------------------------------------------------

    def accept_channel(self) -> Channel:
        """See IncomingContext."""
        return self.connection.accept_channel(self.listener)

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
        """Run every loader's cleanup, even if one fails. Idempotent."""
        if self._connection is not None and self._connection.requested is not None:
            self._connection.requested.close()
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

    def report_success(self) -> None:
        """Tell the source that the guest is here."""
        self.connection.report_success()

    def report_failure(self, reason: str) -> None:
        """Tell the source, if one has connected, that the guest is not here, and why."""
        if self._connection is not None:
            self._connection.report_failure(reason)

    def close(self) -> None:
        """Close every channel."""
        self.preallocation.close()
        if self._connection is not None:
            self._connection.close()
        if self.guest is not None:
            self.guest.close()
