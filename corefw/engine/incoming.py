"""The destination's side of one migration: wait for the source, load the stream, start the guest.

The stream is hostile until it is loaded. Whatever is wrong with it ends in `failed` with the offset, what was expected
and what came; the source gets SHUT 1, and before that the reason where it is a migfw; and the guest is never started
here. Once it was started here, nothing that goes wrong makes the source believe that it was not.

Source: QEMU's process_incoming_migration_co and _bh, and qemu_loadvm_state (migration/savevm.c).
Threads: one of its own; `abort` and `cancel` come from others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from corefw.channel import Channel, Interrupt, Listener
from corefw.engine.awaiting import Incoming, await_source
from corefw.engine.checking import answer_check
from corefw.engine.custody import tell_outcome
from corefw.engine.guestlock import GuestLock
from corefw.engine.returnpath import ReturnPathWriter
from corefw.engine.scheduling import yielding_to_guests
from corefw.engine.statistics import section_figures
from corefw.engine.strays import StrayChannels
from corefw.engine.unframing import StreamLoader
from corefw.errors import ANYTHING, ChannelError, MachineError, MigfwError
from corefw.machine import AdoptsStreams, Machine, MakesRamBlocks, RunState
from corefw.net.channelset import ChannelSet
from corefw.section import LoaderRegistry, MultiChannelLoader, RunStateLoader, SectionLoader
from corefw.settings import Settings
from corefw.states import MigrationStatus, StateMachine
from corefw.wire.stream import StreamReader

log = logging.getLogger(__name__)

_S = MigrationStatus
DRAIN_SECONDS: Final = 2.0
DRAIN_BYTES: Final = 16 << 20
CANCEL_SECONDS: Final = 5.0
"""Seconds that a cancelled migration has to tell its source. One whose source reads nothing is cut off then."""


class IncomingMigration:
    """One attempt to take a guest in. It is an IncomingContext for the loaders."""

    def __init__(
        self,
        machine: Machine,
        settings: Settings,
        loaders: LoaderRegistry,
        listener: Listener,
        state: StateMachine,
        guest_lock: GuestLock,
        autostart: Callable[[], bool],
        *,
        accepts_again: bool,
    ) -> None:
        self.settings = settings
        self.interrupt = Interrupt()
        self.stream_capabilities: frozenset[str] = frozenset()
        self.error: str | None = None
        self._machine = machine
        self._loaders = loaders
        self._set_up: list[SectionLoader] = []
        self._listener = listener
        self._state = state
        self._guest_lock = guest_lock
        self._autostart = autostart
        self._channel: Channel | None = None
        self._channels = ChannelSet()
        self._accepts_again = accepts_again
        self._source: Incoming | None = None
        self._return_path: ReturnPathWriter | None = None
        self._strays: StrayChannels | None = None
        self._explains = False
        self._cancelled = False
        self._cancelling = threading.Lock()
        self._cut_off = threading.Timer(CANCEL_SECONDS, self.abort)
        self._cut_off.daemon = True
        self._thread = threading.Thread(target=self._run, name="incoming migration", daemon=True)

    # -- from other threads ----------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Nothing of it goes on when this returns, unless its own thread asks (in an observer)."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def figures(self) -> dict[str, dict[str, object]]:
        """What the loaders report of themselves, by section."""
        return section_figures(self._set_up)

    def abort(self) -> None:
        """End it, wherever it is."""
        self.interrupt.set()
        if self._channel is not None:
            self._channel.abort()
        self._channels.abort()

    def cancel(self) -> None:
        """End it, unless the guest is here already, and tell the source; the status becomes `cancelled`."""
        with self._cancelling:
            first, self._cancelled = not self._cancelled, True
        self.interrupt.set()
        self._channels.abort()
        if first:
            self._cut_off.start()

    # -- for the loaders ---------------------------------------------------------------------------

    def accept_channel(self) -> Channel:
        return self._channels.add(self._listener.accept(self.interrupt))

    def send_return_message(self, message: int, body: bytes) -> None:
        if self._return_path is None:
            raise ChannelError("the source has not opened the return path")
        self._return_path.send(message, body)

    def open_return_path(self) -> ReturnPathWriter:
        """The source asked for it. Raises ChannelError where bytes flow one way only."""
        assert self._channel is not None
        if not self._channel.has_return_path:
            raise ChannelError(
                f"the source wants a return path, but {self._channel.peer} is one-way"
                " (switch its capability 'return-path' off)"
            )
        self._return_path = ReturnPathWriter(self._channel)
        return self._return_path

    def begins(self) -> None:
        """The first section comes: it is a migration, so nobody else is waited for."""
        if self._state.status is not _S.SETUP:
            return
        if not any(isinstance(loader, MultiChannelLoader) and loader.takes_channels() for loader in self._loaders):
            assert self._channel is not None
            self._strays = StrayChannels(self._listener, self._channel.abort)
        self._advance(_S.SETUP, _S.ACTIVE)

    def source_is_migfw(self) -> None:
        """The source reads reasons (MIGFW_PING)."""
        self._explains = True

    def source_may_pause(self, allowed: bool) -> None:
        """Whether the source may be silent for long at this point of the stream."""
        if self._source is not None:
            self._source.may_pause(allowed)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason: str | None = None
        try:
            self._take_in()
        except MigfwError as error:
            reason = str(self._cause(error))
        except ANYTHING as bug:
            log.exception("the incoming migration failed")
            reason = f"internal error: {type(bug).__name__}: {bug}"
        if self._strays is not None:
            self._strays.stop()
        self._listener.close()
        if reason is None:
            tell_outcome(self._set_up, committed=True)
            self._state.advance(_S.ACTIVE, _S.COMPLETED)
            self._say_goodbye(None)
        else:
            self._fail(reason)
        self._cut_off.cancel()
        self._channels.close()
        if self._channel is not None:
            self._channel.close()

    def _take_in(self) -> None:
        self._source, reader = await_source(
            self._listener,
            self.settings,
            self.interrupt,
            self._hold,
            self._answer_check,
            again=self._accepts_again,
        )
        self.interrupt.check()
        self._load(self._source, reader)
        with self._guest_lock.unless(self.interrupt.check):
            self.interrupt.check()
            self._start_guest()

    def _answer_check(self, reader: StreamReader, channel: Channel) -> None:
        answer_check(reader, channel, self._machine, self.settings, self._loaders)

    def _hold(self, channel: Channel | None) -> None:
        self._channel = channel

    def _load(self, source: Incoming, reader: StreamReader) -> None:
        try:
            for loader in self._loaders:
                self._set_up.append(loader)
                loader.setup(self)
            with yielding_to_guests():
                StreamLoader(reader, source, self._machine, self._loaders, self.settings, self).load()
        except ChannelError as error:
            raise ChannelError(f"{error} (at offset {reader.offset} of the stream)") from error
        finally:
            for loader in self._set_up:
                self._clean_up(loader)

    def _cause(self, error: MigfwError) -> MigfwError:
        """What failed first: a channel of multifd aborts the stream."""
        if self._strays is not None:
            try:
                self._strays.check()
            except MigfwError as first:
                return first
        return error

    def _clean_up(self, loader: SectionLoader) -> None:
        """What it raises hides no cause, and keeps no other from cleaning up."""
        try:
            loader.cleanup()
        except ANYTHING:
            log.exception("section %s: cleanup failed", loader.key)

    def _start_guest(self) -> None:
        """Bring the guest into the run state that the source had (process_incoming_migration_bh)."""
        carried = [loader.run_state() for loader in self._loaders if isinstance(loader, RunStateLoader)]
        source = next((state for state in carried if state is not None), RunState.RUNNING)
        if isinstance(self._machine, AdoptsStreams):
            self._machine.set_run_state(RunState.PAUSED)
        elif source is not RunState.RUNNING:
            self._machine.set_run_state(source)
        elif not self._autostart():
            self._machine.set_run_state(RunState.PAUSED)
        else:
            try:
                self._machine.start()
            except ANYTHING:
                if self._machine.run_state is not RunState.RUNNING:
                    raise
                log.exception("the guest has arrived and runs, but with errors")  # somebody who watches it

    def _fail(self, reason: str) -> None:
        if self._cancelled:
            end, reason = _S.CANCELLED, "it was cancelled on the destination"
        else:
            end, self.error = _S.FAILED, f"load of migration failed: {reason}"
            log.warning("%s", self.error)
        if isinstance(self._machine, MakesRamBlocks):
            self._machine.discard_loaded()
        self._say_goodbye(reason)
        tell_outcome(self._set_up, committed=False)
        while (status := self._state.status) is not end:
            self._state.advance(status, end)

    def _say_goodbye(self, reason: str | None) -> None:
        """Tell the source how it ended; `reason` is None for success. Then take in what it still sends, for a socket
        closed on unread bytes would take SHUT with it."""
        if self._channel is None:
            return
        if self._return_path is None and reason is not None and self._channel.has_return_path:
            # It failed before OPEN_RETURN_PATH came. A source that will open it learns that its guest may run on; one
            # that will not never reads this.
            self._return_path = ReturnPathWriter(self._channel)
        if self._return_path is None:
            return
        try:
            if reason is not None and self._explains:
                self._return_path.explain(reason)
            self._return_path.shut(0 if reason is None else 1)
            self._channel.send_eof()
            self._drain(self._channel)
        except ChannelError as error:
            log.debug("the source went away: %s", error)
        except ANYTHING:  # a transport is a plugin: the migration is over, whatever it does
            log.exception("cannot report the result to the source")

    def _drain(self, channel: Channel) -> None:
        scratch = memoryview(bytearray(1 << 16))
        taken = 0
        deadline = time.monotonic() + DRAIN_SECONDS
        while taken < DRAIN_BYTES and channel.wait_readable(deadline - time.monotonic()):
            count = channel.receive_into(scratch)
            if not count:
                return
            taken += count

    def _advance(self, expected: MigrationStatus, new: MigrationStatus) -> None:
        if not self._state.advance(expected, new):
            raise MachineError(f"the incoming migration is {self._state.status}, expected {expected}")
