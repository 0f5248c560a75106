"""The source's side of one migration: its thread, from setup to completion.

However it ends, custody.py first decides what becomes of the guest, then everything is let go, and then the status
changes: whoever sees the end sees the guest as it will stay.

    setup        header, configuration, OPEN_RETURN_PATH, PINGs, START sections; wait for the PONG of the last PING
    passes       PART sections until what is left fits into the downtime limit (passes.py)
    switchover   stop the guest, [pre-switchover], END sections, FULL sections
    hand over    EOF and description; wait for SHUT where there is a return path

Source: QEMU's migration_thread, migration_completion, migration_iteration_finish.
Threads: one of its own; `cancel` and `proceed` come from others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from corefw.channel import Channel, Interrupt, Transport
from corefw.engine.coverage import uncovered
from corefw.engine.custody import Custody
from corefw.engine.framing import SectionWriter
from corefw.engine.guestlock import GuestLock
from corefw.engine.limits import Limits
from corefw.engine.passes import Passes
from corefw.engine.returnpath import ReturnPathReader
from corefw.engine.scheduling import yielding_to_guests
from corefw.engine.statistics import OutgoingStatistics, milliseconds_since
from corefw.errors import ANYTHING, BlockedError, ChannelError, Interrupted, MachineError, MigfwError, PluginError
from corefw.machine import DEAD, AdoptsStreams, Machine, RunState, StreamFormat, SupportsThrottle
from corefw.net.channelset import ChannelSet
from corefw.section import HasRamStatistics, LiveHandler, SectionRegistry
from corefw.settings import Settings
from corefw.states import IDLE, SETUP_OR_ACTIVE, MigrationStatus, StateMachine
from corefw.wire.constants import MIGFW_PING, READY_PING, Command, SectionType
from corefw.wire.globalstate import CarriesRunState
from corefw.wire.records import (
    Configuration,
    ping_payload,
    write_command,
    write_configuration,
    write_description,
    write_header,
)
from corefw.wire.stream import MemorySink, StreamWriter

log = logging.getLogger(__name__)

_S = MigrationStatus

ACK_PATIENCE: Final = 30.0
"""Seconds to wait for SWITCHOVER_ACK when everything else is ready."""
ACK_LOOK: Final = 0.1
"""Seconds after which such a wait looks for a cancel."""

LAST_WORDS: Final = 1.0
"""Seconds that a destination whose connection broke has to say why: what it said may still be on its way."""

LOOK: Final = 0.1
"""Seconds after which a wait for the destination looks at x-migfw-confirm-timeout again."""


class OutgoingMigration:
    """One attempt to send the guest away. It is an OutgoingContext for the handlers."""

    def __init__(
        self,
        machine: Machine,
        settings: Settings,
        registry: SectionRegistry,
        transport: Transport,
        state: StateMachine,
        guest_lock: GuestLock,
        on_pass: Callable[[int], None],
    ) -> None:
        self.settings = settings
        self.interrupt = Interrupt()
        self.statistics = OutgoingStatistics(expected_downtime=settings.integer("downtime-limit"))
        self._machine = machine
        self._registry = registry
        self._transport = transport
        self._state = state
        self._custody = Custody(machine, guest_lock)
        self._live: list[LiveHandler] = []
        self._limits = Limits(settings)
        self._passes = Passes(
            machine, self._live, settings, self.statistics, self.interrupt, self._limits, self._check, on_pass
        )
        self._proceed = threading.Event()
        self._channel: Channel | None = None
        self._channels = ChannelSet()
        self._return_path: ReturnPathReader | None = None
        self._downtime_began = 0.0
        self._counting = False
        self.confirmed = False
        self._thread = threading.Thread(target=self._run, name="migration", daemon=True)

    # -- from other threads ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Raises RuntimeError if the host gives no thread; then nothing was started."""
        watch = partial(self._limits.watch, self._abort, lambda: self._state.status is not _S.SETUP)
        threading.Thread(target=watch, name="limits", daemon=True).start()
        try:
            self._thread.start()
        except RuntimeError:
            self._limits.end()
            raise

    def join(self) -> None:
        """Nothing of it goes on when this returns, unless its own thread asks (in an observer)."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def is_safe_elsewhere(self) -> bool:
        """Whether it is known that the guest is elsewhere, whole: the destination said so, or a file has it."""
        stored = self._transport.features.atomic and self._state.status is _S.COMPLETED
        return self.confirmed or stored

    def _whereabouts(self) -> str:
        """Where a guest is whose migration has completed, for query-migrate's x-migfw.guest."""
        if self.confirmed:
            return "moved"
        return "stored" if self._transport.features.atomic else "unconfirmed"

    @property
    def holds_guest(self) -> bool:
        """Whether it has stopped the guest and not decided yet what becomes of it: then nobody else may start it. To
        be asked under the guest's lock."""
        return self._custody.held and self._state.status not in IDLE

    def cancel(self) -> None:
        """Begin to end it, in whatever state; nothing happens when it is over. The caller sees to it that no other
        migration begins meanwhile (QEMU's migrate_fd_cancel)."""
        while (status := self._state.status) in SETUP_OR_ACTIVE:
            if self._state.advance(status, _S.CANCELLING):
                self._abort()
                return

    def proceed(self) -> None:
        """Go on from pre-switchover (migrate-continue)."""
        self._proceed.set()

    def _return_path_failed(self) -> None:
        """Wake the thread wherever it waits; it finds the reason in the return path."""
        self._abort_channels()
        self._proceed.set()

    def _abort(self) -> None:
        """Wake the thread wherever it waits, to end the migration."""
        self.interrupt.set()
        self._proceed.set()
        self._abort_channels()

    def _abort_channels(self) -> None:
        if self._channel is not None:
            self._channel.abort()
        self._channels.abort()

    # -- for the handlers ------------------------------------------------------------------------------------------

    def open_channel(self) -> Channel:
        if not self._transport.features.multi_channel:
            raise ChannelError(f"{self._transport.uri}: '{self._transport.uri.scheme}' has only one channel")
        return self._channels.add(self._transport.connect(self.interrupt))

    def throttle_guest(self, percent: int) -> None:
        if not isinstance(self._machine, SupportsThrottle):
            raise MachineError(f"a machine of kind '{self._machine.kind}' cannot be throttled")
        self._custody.throttle(self._machine, percent, self._check)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: MigfwError | None = None
        try:
            self._migrate()
        except MigfwError as caught:
            error = caught
        except ANYTHING as bug:
            log.exception("the migration thread failed")
            error = MigfwError(f"internal error: {type(bug).__name__}: {bug}")
        self._limits.end()
        if error is not None:
            error = self._break_off(error)
        if error is None:
            self.statistics.finish(downtime=milliseconds_since(self._downtime_began), guest=self._whereabouts())
            self._custody.let_go()
        else:
            self._begin_to_fail()
            refused = self._return_path is not None and self._return_path.refused
            self.statistics.fail(str(error) + self._custody.take_back(refused=refused))
        self._clean_up()
        self._end(_S.COMPLETED if error is None else _S.FAILED)

    def _migrate(self) -> None:
        self._channel = channel = self._transport.connect(self.interrupt)
        self.interrupt.check()
        setup_began = time.monotonic()
        writer = StreamWriter(channel)
        sections = self._setup(writer, channel)
        self.statistics.setup_time = milliseconds_since(setup_began)
        self._advance(_S.SETUP, _S.ACTIVE)
        with yielding_to_guests():
            self._passes.run(writer, sections)
            if self._await_switchover_ack() and not self._limits.reason:
                self._passes.run(writer, sections)  # what the guest has written meanwhile
        self._switch_over(writer, sections)
        self._hand_over(writer, sections, channel)

    def _await_switchover_ack(self) -> bool:
        """Whether it had to be waited for. A guest that is stopped loses nothing by switching over at once (QEMU 10.0,
        migration_can_switchover)."""
        path = self._return_path
        if not self.settings.capability("switchover-ack") or self._machine.run_state is not RunState.RUNNING:
            return False
        assert path is not None, "settings refuse switchover-ack without return-path"
        if path.wait_acknowledged(0):
            return False
        self._check()
        end = time.monotonic() + ACK_PATIENCE
        while not path.wait_acknowledged(ACK_LOOK):
            self._check()
            if time.monotonic() > end:
                raise MachineError(
                    f"the destination has sent no SWITCHOVER_ACK for {ACK_PATIENCE:.0f} s: switch the capability"
                    " 'switchover-ack' on there too, or off here"
                )
        return True

    def _setup(self, writer: StreamWriter, channel: Channel) -> SectionWriter:
        live = self._active_handlers()
        form = self._format()
        write_header(writer)
        if form.configuration:
            write_configuration(writer, Configuration(self._machine.name, form.configuration_tail))
        if self.settings.capability("return-path"):
            self._return_path = ReturnPathReader(channel, self._return_path_failed)
            self._return_path.start()
            write_command(writer, Command.OPEN_RETURN_PATH)
            write_command(writer, Command.PING, ping_payload(1))
            write_command(writer, Command.PING, ping_payload(MIGFW_PING))
        writer.flush()  # setup may take long: the destination shall know that a migration comes
        sections = SectionWriter(writer, self.statistics, footers=form.footers, ids=form.section_ids)
        for handler in live:
            self._live.append(handler)  # from here on it is cleaned up
            with self._passes.told():
                sections.start(handler, partial(handler.setup, writer, self))
                if isinstance(handler, HasRamStatistics):
                    self._count_by(handler)
        if self._return_path is not None:
            write_command(writer, Command.PING, ping_payload(READY_PING))
        writer.flush()
        if self._return_path is not None:
            self._wait_accepted(self._return_path, channel)
        return sections

    def _wait_accepted(self, path: ReturnPathReader, channel: Channel) -> None:
        """No RAM goes out before the destination has accepted all START sections. Raises PeerError if it did not."""
        self._wait_for_word(
            partial(path.wait_pong, READY_PING), f"{channel.peer} did not answer the start of the migration"
        )
        self._check()

    def _wait_for_word(self, wait: Callable[[float], bool], complaint: str) -> None:
        """Wait for something on the return path. Raises ChannelError after x-migfw-confirm-timeout."""
        began = time.monotonic()
        while not wait(LOOK):
            limit = self.settings.integer("x-migfw-confirm-timeout")
            if limit and time.monotonic() - began >= limit / 1000:
                raise ChannelError(f"{complaint} within {limit / 1000:g} s (parameter x-migfw-confirm-timeout)")

    def _active_handlers(self) -> list[LiveHandler]:
        """The live handlers that have something to send. Raises BlockedError if what is left carries less than the
        whole machine."""
        live = [handler for handler in self._registry.live() if handler.active()]
        if missing := uncovered(self._machine, [*live, *self._registry.state()]):
            raise BlockedError(missing)
        return live

    def _count_by(self, handler: HasRamStatistics) -> None:
        if self._counting:
            raise PluginError("two section handlers count the RAM's pages: query-migrate has room for one of them")
        self._counting = True
        self.statistics.ram = handler.ram_statistics()

    def _format(self) -> StreamFormat:
        """How this stream is framed: as a parked machine's stream was, or as the settings say."""
        stored = self._machine.stored_format() if isinstance(self._machine, AdoptsStreams) else None
        return stored or StreamFormat(
            configuration=self.settings.property("send-configuration"),
            footers=self.settings.property("send-section-footer"),
            configuration_tail=b"",
            section_ids={},
        )

    def _switch_over(self, writer: StreamWriter, sections: SectionWriter) -> None:
        """Stop the guest and send all the rest but the end mark (migration_completion)."""
        self._limits.end()
        limit = self.settings.integer("downtime-limit")
        stop_began = time.monotonic()
        self._custody.stop(self._check, self._store_run_state)
        self.statistics.stopped(limit, milliseconds_since(stop_began))
        if self.settings.capability("pause-before-switchover"):
            self._pause()
        else:
            self._advance(_S.ACTIVE, _S.DEVICE)
        self._downtime_began = stop_began
        if self._format().switchover_start:
            write_command(writer, Command.SWITCHOVER_START)
        with self._passes.told():
            for handler in self._live:
                sections.end(handler)
        for device in self._registry.state():
            if device.needed():
                sections.full(device)
        writer.flush()

    def _store_run_state(self, state: RunState) -> None:
        for handler in self._registry:
            if isinstance(handler, CarriesRunState):
                handler.store(state)

    def _pause(self) -> None:
        """Wait in pre-switchover for migrate-continue. QEMU counts this time as downtime, and so do we."""
        self._proceed.clear()
        self._advance(_S.ACTIVE, _S.PRE_SWITCHOVER)
        self._check()  # what woke us before clear() would not wake us again
        self._proceed.wait()
        self._check()
        self._advance(_S.PRE_SWITCHOVER, _S.DEVICE)

    def _hand_over(self, writer: StreamWriter, sections: SectionWriter, channel: Channel) -> None:
        """The end mark: from its first byte on the destination may run the guest."""
        description = self._description(sections)
        self._check()
        self._custody.handed_over = not self._transport.features.atomic
        if self._return_path is not None:
            self._return_path.expect_end()
        if isinstance(self._machine, AdoptsStreams):
            for piece in self._machine.stored_sections():
                writer.write(piece)
        else:
            writer.u8(SectionType.EOF)
            writer.write(description)
        writer.flush()
        self.statistics.transferred = writer.position
        if self._return_path is not None:
            self._wait_for_word(self._return_path.wait, f"{channel.peer} did not confirm that it has the guest")
            self._return_path.check()
            self.confirmed = True
            with suppress(ChannelError):  # the destination has all it wants; relays like to see an end
                channel.send_eof()
        else:
            channel.send_eof()

    def _description(self, sections: SectionWriter) -> bytes:
        """Made before anything is handed over: it has what plugins say of their sections."""
        if isinstance(self._machine, AdoptsStreams) or not self.settings.property("send-vmdescription"):
            return b""
        made = MemorySink()
        writer = StreamWriter(made)
        write_description(writer, sections.description())
        writer.flush()
        return bytes(made.data)

    # -- how it ends -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise if the migration was cancelled or has already failed."""
        self.interrupt.check()
        if self._return_path is not None:
            self._return_path.check()
        if self._machine.run_state in DEAD:
            raise MachineError(f"the guest ended during the migration ({self._machine.run_state})")

    def _advance(self, expected: MigrationStatus, new: MigrationStatus) -> None:
        if not self._state.advance(expected, new):
            raise Interrupted("cancelled")

    def _break_off(self, error: MigfwError) -> MigfwError | None:
        """Let nothing more reach the destination. What failed first; None where it turns out that the destination has
        the guest."""
        path = self._return_path
        if path is not None and isinstance(error, ChannelError) and not self.interrupt.is_set():
            path.wait(LAST_WORDS)
        self._abort_channels()
        if path is not None:
            path.join()
            if path.accepted:
                self.confirmed = True
                return None
        return self._cause(error)

    def _cause(self, error: MigfwError) -> MigfwError:
        """What failed first: a guest that died takes its memory's logs along, and a return path that broke aborts the
        channel; what they bring about says little."""
        if self._machine.run_state in DEAD:
            return MachineError(f"the guest ended during the migration ({self._machine.run_state})")
        if self._limits.cancelled:
            return MigfwError(f"{self._limits.reason}; {self.statistics.progress()}")
        if self._return_path is not None and not self.interrupt.is_set():
            try:
                self._return_path.check()
            except Interrupted:
                pass  # that was our own abort
            except MigfwError as first:
                return first
        return error

    def _clean_up(self) -> None:
        """Run every cleanup step even if one fails."""
        for handler in self._live:
            try:
                handler.cleanup()
            except ANYTHING:
                log.exception("section %s: cleanup failed", handler.key)
        if self._return_path is not None:
            self._return_path.join()
        self._channels.close()
        if self._channel is not None:
            self._channel.close()

    def _begin_to_fail(self) -> None:
        """Into failing, unless it was cancelled: from now on it cannot be any more."""
        while (now := self._state.status) not in (_S.CANCELLING, _S.FAILING):
            self._state.advance(now, _S.FAILING)

    def _end(self, status: MigrationStatus) -> None:
        """Last of all. A cancel may change the status under our hands once: then a failure is its end, but not where
        the destination has the guest."""
        while True:
            now = self._state.status
            end = _S.CANCELLED if status is _S.FAILED and now is _S.CANCELLING else status
            if self._state.advance(now, end):
                break
        if self.statistics.error is not None:
            log.warning("migration %s: %s", end, self.statistics.error)
