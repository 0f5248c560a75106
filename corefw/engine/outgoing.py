"""The source's side of one migration: its thread, from setup to completion.

The law: the guest belongs to the source until the destination may be running it. Every failure and every cancel before
that moment lets the guest run on here, if it ran before; after it, only the destination's own word that it failed does.

    setup        header, configuration, OPEN_RETURN_PATH, START sections
    iterate      PART sections until what is left fits into the downtime limit
    switchover   stop the guest, [pre-switchover], END sections, FULL sections
    hand over    EOF and description; wait for SHUT where there is a return path

Source: the seed's migration_thread, migration_iteration_run, migration_completion, migration_iteration_finish.
Threads: one of its own; `cancel` and `proceed` come from others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from corefw.channel import Channel, Interrupt, Transport
from corefw.engine.convergence import Convergence
from corefw.engine.framing import SectionWriter
from corefw.engine.pacing import Pacer
from corefw.engine.returnpath import ReturnPathReader
from corefw.engine.statistics import OutgoingStatistics, milliseconds_since
from corefw.errors import ChannelError, Interrupted, MachineError, MigfwError
from corefw.machine import DEAD, AdoptsStreams, Machine, RunState, StreamFormat, SupportsThrottle
from corefw.section import HasRamStatistics, LiveHandler, SectionRegistry
from corefw.settings import Settings
from corefw.states import SETUP_OR_ACTIVE, MigrationStatus, StateMachine
from corefw.wire.constants import Command, SectionType
from corefw.wire.globalstate import CarriesRunState
from corefw.wire.records import (
    Configuration,
    ping_payload,
    write_command,
    write_configuration,
    write_description,
    write_header,
)
from corefw.wire.stream import StreamWriter

log = logging.getLogger(__name__)

_S = MigrationStatus


class OutgoingMigration:
    """One attempt to send the guest away. It is an OutgoingContext for the handlers."""

    def __init__(
        self,
        machine: Machine,
        settings: Settings,
        registry: SectionRegistry,
        transport: Transport,
        state: StateMachine,
        guest_lock: threading.RLock,
        on_pass: Callable[[int], None],
    ) -> None:
        self.settings = settings
        self.interrupt = Interrupt()
        self.statistics = OutgoingStatistics(expected_downtime=settings.integer("downtime-limit"))
        self._machine = machine
        self._registry = registry
        self._transport = transport
        self._state = state
        self._guest_lock = guest_lock
        self._on_pass = on_pass
        self._live: list[LiveHandler] = []
        self._proceed = threading.Event()
        self._channel: Channel | None = None
        self._return_path: ReturnPathReader | None = None
        self._run_state_before = machine.run_state
        self._stopped = False
        self._downtime_began = 0.0
        self._handed_over = False
        self.confirmed = False
        self._thread = threading.Thread(target=self._run, name="migration", daemon=True)

    # -- from other threads ----------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def cancel(self) -> None:
        """Begin to end it, in whatever state; nothing happens when it is over (the seed's migrate_fd_cancel)."""
        while (status := self._state.status) in SETUP_OR_ACTIVE:
            if self._state.advance(status, _S.CANCELLING):
                self.interrupt.set()
                self._proceed.set()
                if self._channel is not None:
                    self._channel.abort()
                return

    def proceed(self) -> None:
        """Go on from pre-switchover (migrate-continue)."""
        self._proceed.set()

    def _return_path_failed(self) -> None:
        """Wake the thread wherever it waits; it finds the reason in the return path."""
        if self._channel is not None:
            self._channel.abort()
        self._proceed.set()

    # -- for the handlers ------------------------------------------------------------------------------------------

    def open_channel(self) -> Channel:
        if not self._transport.features.multi_channel:
            raise ChannelError(f"{self._transport.uri}: '{self._transport.uri.scheme}' has only one channel")
        return self._transport.connect(self.interrupt)

    def throttle_guest(self, percent: int) -> None:
        if not isinstance(self._machine, SupportsThrottle):
            raise MachineError(f"a machine of kind '{self._machine.kind}' cannot be slowed down")
        self._machine.throttle(percent)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: MigfwError | None = None
        try:
            self._migrate()
        except MigfwError as caught:
            error = caught
        except Exception as bug:
            log.exception("the migration thread failed")
            error = MigfwError(f"internal error: {type(bug).__name__}: {bug}")
        try:
            self._clean_up(graceful=error is None)
        finally:
            self._finish(self._cause(error))

    def _migrate(self) -> None:
        with self._timed_setup():
            self._channel = channel = self._transport.connect(self.interrupt)
            self.interrupt.check()
            writer = StreamWriter(channel)
            sections = self._setup(writer, channel)
        self._advance(_S.SETUP, _S.ACTIVE)
        self._iterate(writer, sections)
        self._switch_over(writer, sections)
        self._hand_over(writer, sections, channel)

    def _timed_setup(self) -> _Timer:
        def done(milliseconds: int) -> None:
            self.statistics.setup_time = milliseconds

        return _Timer(done)

    def _setup(self, writer: StreamWriter, channel: Channel) -> SectionWriter:
        form = self._format()
        write_header(writer)
        if form.configuration:
            write_configuration(writer, Configuration(self._machine.name, form.configuration_tail))
        if self.settings.capability("return-path"):
            self._return_path = ReturnPathReader(channel, self._return_path_failed)
            self._return_path.start()
            write_command(writer, Command.OPEN_RETURN_PATH)
            write_command(writer, Command.PING, ping_payload(1))
        sections = SectionWriter(writer, footers=form.footers, ids=form.section_ids)
        for handler in self._registry.live():
            if not handler.active():
                continue
            self._live.append(handler)  # from here on it is cleaned up
            sections.start(handler, partial(handler.setup, writer, self))
            if isinstance(handler, HasRamStatistics):
                self.statistics.ram = handler.ram_statistics()
                self._on_pass(self.statistics.ram.dirty_sync_count)
        writer.flush()
        return sections

    def _format(self) -> StreamFormat:
        """How this stream is framed: as a parked machine's stream was, or as the settings say."""
        stored = self._machine.stored_format() if isinstance(self._machine, AdoptsStreams) else None
        return stored or StreamFormat(
            configuration=self.settings.property("send-configuration"),
            footers=self.settings.property("send-section-footer"),
            configuration_tail=b"",
            section_ids={},
        )

    def _iterate(self, writer: StreamWriter, sections: SectionWriter) -> None:
        """Passes over what is dirty, until the rest fits into the downtime limit (migration_iteration_run)."""
        pacer = Pacer()
        convergence = Convergence(time.monotonic(), self.settings.integer("downtime-limit"), writer.position)
        while True:
            self._check()
            passes = self.statistics.ram.dirty_sync_count
            pending = sum(handler.pending(convergence.threshold).total for handler in self._live)
            if self.statistics.ram.dirty_sync_count != passes:
                self._on_pass(self.statistics.ram.dirty_sync_count)
            if convergence.fits(pending):
                return
            before = writer.position
            limit = self.settings.integer("max-bandwidth")
            self._send_parts(writer, sections, pacer.budget(limit))
            pacer.sent(writer.position - before, limit, self.interrupt)
            self._count(writer, convergence)

    def _send_parts(self, writer: StreamWriter, sections: SectionWriter, budget: int) -> None:
        """One PART of each handler; a later one has its turn only when those before have nothing left."""
        for handler in self._live:
            if not sections.part(handler, partial(handler.iterate, writer, budget)):
                break
        writer.flush()

    def _count(self, writer: StreamWriter, convergence: Convergence) -> None:
        ram = self.statistics.ram
        convergence.update(
            time.monotonic(),
            writer.position,
            self.settings.integer("downtime-limit"),
            ram.dirty_pages_rate * ram.page_size,
        )
        self.statistics.transferred = self.statistics.precopy_bytes = writer.position
        self.statistics.mbps = convergence.bandwidth * 8 / 1e6
        self.statistics.pages_per_second = int(convergence.bandwidth / ram.page_size)
        self.statistics.expected_downtime = convergence.expected_downtime

    def _switch_over(self, writer: StreamWriter, sections: SectionWriter) -> None:
        """Stop the guest and send all the rest but the end mark (migration_completion)."""
        stop_began = time.monotonic()
        with self._guest_lock:
            self._run_state_before = self._machine.run_state
            for handler in self._registry:
                if isinstance(handler, CarriesRunState):
                    handler.store(self._run_state_before)
            self._machine.stop(RunState.FINISH_MIGRATE)
            self._stopped = True
        if self.settings.capability("pause-before-switchover"):
            self._pause()
        self._downtime_began = stop_began
        for handler in self._live:
            sections.end(handler)
        for device in self._registry.state():
            if device.needed():
                sections.full(device)
        writer.flush()

    def _pause(self) -> None:
        """Wait in pre-switchover for migrate-continue. The seed counts this time as downtime, and so do we."""
        self._proceed.clear()
        self._advance(_S.ACTIVE, _S.PRE_SWITCHOVER)
        self._proceed.wait()
        self._check()
        self._advance(_S.PRE_SWITCHOVER, _S.DEVICE)

    def _hand_over(self, writer: StreamWriter, sections: SectionWriter, channel: Channel) -> None:
        """The end mark: from its first byte on the destination may run the guest."""
        self._check()
        self._handed_over = not self._transport.features.atomic
        if isinstance(self._machine, AdoptsStreams):
            for piece in self._machine.stored_sections():
                writer.write(piece)
        else:
            writer.u8(SectionType.EOF)
            if self.settings.property("send-vmdescription"):
                write_description(writer, sections.description())
        writer.flush()
        self.statistics.transferred = writer.position
        if self._return_path is not None:
            self._return_path.wait()
            self.confirmed = True
            with suppress(ChannelError):  # the destination has all it wants; relays like to see an end
                channel.send_eof()
        else:
            channel.send_eof()

    # -- how it ends -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise when there is no point in going on."""
        self.interrupt.check()
        if self._return_path is not None:
            self._return_path.check()
        if self._machine.run_state in DEAD:
            raise MachineError(f"the guest ended during the migration ({self._machine.run_state})")

    def _advance(self, expected: MigrationStatus, new: MigrationStatus) -> None:
        if not self._state.advance(expected, new):
            raise Interrupted("cancelled")

    def _cause(self, error: MigfwError | None) -> MigfwError | None:
        """What failed first: a guest that died takes its memory's logs along, and a return path that broke aborts the
        channel; what they bring about says little."""
        if error is not None and self._machine.run_state in DEAD:
            return MachineError(f"the guest ended during the migration ({self._machine.run_state})")
        if error is not None and self._return_path is not None and not self.interrupt.is_set():
            try:
                self._return_path.check()
            except Interrupted:
                pass  # that was our own abort
            except MigfwError as first:
                return first
        return error

    def _clean_up(self, *, graceful: bool) -> None:
        for handler in self._live:
            handler.cleanup()
        if self._channel is not None:
            if not graceful:
                self._channel.abort()
            if self._return_path is not None:
                self._return_path.join()
            self._channel.close()

    def _finish(self, error: MigfwError | None) -> None:
        if error is None:
            self._complete()
        else:
            self._fail(error)

    def _complete(self) -> None:
        statistics = self.statistics
        statistics.total_time = statistics.elapsed()
        statistics.downtime = milliseconds_since(self._downtime_began)
        statistics.mbps = statistics.transferred * 8 / max(1, statistics.total_time) / 1000
        statistics.ram.remaining_bytes = 0
        with self._guest_lock:
            self._machine.set_run_state(RunState.POSTMIGRATE)
        while not self._state.advance(self._state.status, _S.COMPLETED):
            pass  # a cancel that comes too late changes the state under our hands once

    def _fail(self, error: MigfwError) -> None:
        refused = self._return_path is not None and self._return_path.refused
        reason = str(error)
        if self._stopped:
            with self._guest_lock:
                reason += self._resume(may_run_there=self._handed_over and not refused)
        self.statistics.error = reason
        self.statistics.total_time = self.statistics.elapsed()
        while (status := self._state.status) not in (_S.FAILED, _S.CANCELLED):
            self._state.advance(status, _S.CANCELLED if status is _S.CANCELLING else _S.FAILED)
        log.warning("migration %s: %s", self._state.status, reason)

    def _resume(self, *, may_run_there: bool) -> str:
        """Let the guest run on here, unless it may run there; what to add to the reason."""
        if may_run_there:
            self._machine.set_run_state(RunState.POSTMIGRATE)
            return (
                "; the destination had everything and may be running the guest, so it stays stopped here"
                " ('cont' starts it, if you know that the destination does not run it)"
            )
        if self._run_state_before is not RunState.RUNNING:
            self._machine.set_run_state(self._run_state_before)
            return ""
        try:
            self._machine.start()
        except MachineError as failure:
            return f"; and the guest could not be started again: {failure}"
        return ""


class _Timer:
    """Milliseconds that a block took, also when it raises."""

    def __init__(self, done: Callable[[int], None]) -> None:
        self._done = done

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._done(milliseconds_since(self._began))
