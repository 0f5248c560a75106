"""The phases of a precopy migration on the source.

    set_up           header, configuration, OPEN_RETURN_PATH, PINGs, START sections; wait for the last PING's PONG
    send_passes      PART sections until what is left fits into the downtime limit (passes.py); stop the guest
    await_continue   pre-switchover: wait for migrate-continue
    switch_over      END sections, FULL sections, EOF, description; wait for SHUT if there is a return path

Source: QEMU 10.0, migration_thread, migration_completion_precopy. Threads: the migration thread.
"""

from __future__ import annotations

import logging
import mmap
import time
from contextlib import nullcontext
from functools import partial, reduce
from operator import or_
from typing import Final

from corefw.engine.coverage import uncovered
from corefw.engine.framing import SectionWriter
from corefw.engine.liveness import interval_of
from corefw.engine.scheduling import yielding_to_guests
from corefw.engine.source import Source, needs_return_path
from corefw.engine.statistics import milliseconds_since
from corefw.errors import BlockedError, ChannelError, MachineError, PluginError
from corefw.machine import RunState
from corefw.section import LiveSaver, RamSaver, RunStateSaver
from corefw.states import MigrationStatus
from corefw.wire.constants import MIGFW_PING, READY_PING, TARGET_PAGE_SIZE, Command, ReturnMessage
from corefw.wire.records import (
    Configuration,
    PostcopyAdvice,
    postcopy_advise_payload,
    write_command,
    write_configuration,
    write_header,
)

log = logging.getLogger(__name__)

ACK_PATIENCE: Final = 30.0
"""Seconds to wait for SWITCHOVER_ACK when everything else is ready."""


# -- setup -------------------------------------------------------------------------------------------------------------


def set_up(source: Source) -> MigrationStatus:
    """Connect, begin the stream, and wait until the destination has accepted every section: no RAM is sent before.

    Raises BlockedError if the savers would leave part of the machine behind.
    """
    source.link.connect()
    source.interrupt.check()
    began = time.monotonic()
    savers = _active_savers(source)
    _write_head(source)
    source.open_requested_early()
    for saver in savers:
        source.live.append(saver)  # from here on it is cleaned up
        with source.passes.reporting():
            source.sections.start(saver, partial(saver.setup, source.link.writer, source))
            if isinstance(saver, RamSaver):
                _take_ram_statistics(source, saver)
    if source.link.return_path is not None:
        source.link.ping(READY_PING)
    source.link.writer.flush()
    if source.link.return_path is not None:
        await_confirmation(source, ReturnMessage.PONG, READY_PING, "did not answer the start of the migration")
        source.check()
        source.open_requested()
    source.statistics.setup_time = milliseconds_since(began)
    return MigrationStatus.ACTIVE


def _active_savers(source: Source) -> list[LiveSaver]:
    savers = [saver for saver in source.savers.live() if saver.active()]
    if missing := uncovered(source.machine, [*savers, *source.savers.state()]):
        raise BlockedError(missing)
    return savers


def _write_head(source: Source) -> None:
    """Everything before the first section."""
    form, writer = source.tail.stream_format(source.settings), source.link.writer
    write_header(writer)
    if form.configuration:
        write_configuration(writer, Configuration(source.machine.name, form.configuration_tail))
    if needs_return_path(source.settings, source.link.transport.features):
        source.open_return_path()
        source.link.ping(1)
        source.link.ping(MIGFW_PING)
    if source.settings.capability("postcopy-ram"):
        sizes = reduce(or_, {block.host_page_size for block in source.machine.ram_blocks()}, 0) or mmap.PAGESIZE
        advice = PostcopyAdvice(page_sizes=sizes, target_page_size=TARGET_PAGE_SIZE)
        write_command(writer, Command.POSTCOPY_ADVISE, postcopy_advise_payload(advice))
    elif source.settings.capability("dirty-bitmaps"):
        write_command(writer, Command.POSTCOPY_ADVISE, postcopy_advise_payload(None))
    writer.flush()  # setup may take long, and the destination should know that this is a migration
    source.sections = SectionWriter(writer, source.statistics, footers=form.footers, ids=form.section_ids)


def _take_ram_statistics(source: Source, saver: RamSaver) -> None:
    if any(isinstance(other, RamSaver) and other is not saver for other in source.live):
        raise PluginError("two section savers count the RAM's pages: query-migrate has room for one of them")
    source.statistics.ram = saver.ram_statistics()


def await_confirmation(source: Source, message: ReturnMessage, value: int, complaint: str) -> None:
    """Wait for an answer, for at most x-migfw-confirm-timeout (which may be changed meanwhile)."""

    def check(waited: float) -> None:
        limit = source.settings.integer("x-migfw-confirm-timeout") / 1000
        if limit and waited >= limit:
            peer = source.link.channel.peer
            raise ChannelError(f"{peer} {complaint} within {limit:g} s (parameter x-migfw-confirm-timeout)")

    # Loading the devices may take long in silence. In postcopy that is over, and a mistake only pauses the migration.
    silent = message is ReturnMessage.SHUT and source.left_at is None
    with nullcontext() if silent else source.link.awaiting():
        source.link.await_answer(message, value, check)


# -- active ------------------------------------------------------------------------------------------------------------


def send_passes(source: Source) -> MigrationStatus:
    """Send passes while the guest runs, then stop it."""
    with yielding_to_guests():
        source.passes.run(source.link.writer, source.sections)
        if _await_switchover_ack(source) and not source.limits.reason:
            source.passes.run(source.link.writer, source.sections)  # what the guest has written meanwhile
    if source.postcopy.reason is not None:
        _prepare_postcopy(source)
    _stop_guest(source)
    if source.settings.capability("pause-before-switchover"):
        return MigrationStatus.PRE_SWITCHOVER
    return _after_stop(source)


def _prepare_postcopy(source: Source) -> None:
    """Do while the guest runs what would keep it stopped for longer."""
    source.statistics.prepares_postcopy()
    with source.passes.reporting():
        for saver in source.later():
            saver.prepare_postcopy(source.link.writer)
    source.link.writer.flush()


def _after_stop(source: Source) -> MigrationStatus:
    if (reason := source.postcopy.reason) is None or not source.later():
        return MigrationStatus.DEVICE
    source.statistics.switched_to_postcopy(reason)
    log.info("switched to postcopy: %s", reason)
    return MigrationStatus.POSTCOPY_ACTIVE


def _await_switchover_ack(source: Source) -> bool:
    """Whether it had to be waited for. A guest that is stopped loses nothing by switching over at once (QEMU 10.0,
    migration_can_switchover)."""
    path = source.link.return_path
    if not source.settings.capability("switchover-ack") or source.machine.run_state is not RunState.RUNNING:
        return False
    assert path is not None, "settings refuse switchover-ack without return-path"
    if path.wait(ReturnMessage.SWITCHOVER_ACK, 0, 0):
        return False

    def check(waited: float) -> None:
        source.check()
        source.link.beat()
        if waited > ACK_PATIENCE:
            raise MachineError(
                f"the destination has sent no SWITCHOVER_ACK for {ACK_PATIENCE:.0f} s: switch the capability"
                " 'switchover-ack' on there too, or off here"
            )

    source.link.await_answer(ReturnMessage.SWITCHOVER_ACK, 0, check)
    return True


def _stop_guest(source: Source) -> None:
    """Stop the guest for the switchover."""
    source.limits.guest_stops()
    source.stopped_at = time.monotonic()
    limit = source.settings.integer("downtime-limit")
    source.custody.stop(source.check, partial(_store_run_state, source))
    source.meter.release()
    source.statistics.stopped(limit, milliseconds_since(source.stopped_at))


def _store_run_state(source: Source, state: RunState) -> None:
    for saver in source.savers:
        if isinstance(saver, RunStateSaver):
            saver.store(state)


# -- pre-switchover ----------------------------------------------------------------------------------------------------


def await_continue(source: Source) -> MigrationStatus:
    """Wait for migrate-continue. QEMU counts this time as downtime, and so do we."""
    while not source.proceed.wait(interval_of(source.settings)):
        source.link.beat()
    source.check()
    return _after_stop(source)


# -- device ------------------------------------------------------------------------------------------------------------


def switch_over(source: Source) -> MigrationStatus:
    """Send the rest of the guest, then the end mark: from its first byte on the destination may run the guest."""
    _send_rest(source)
    closing = source.tail.closing(source.sections, source.settings)
    source.custody.hand_over_at_eof(source.check, visible=not source.link.transport.features.atomic)
    source.limits.end()
    source.link.rest()
    if source.link.return_path is not None:
        source.link.return_path.expect(ReturnMessage.SHUT, 0)
    source.link.writer.write(closing)
    source.link.writer.flush()
    if source.link.return_path is None:
        source.link.channel.send_eof()
        return MigrationStatus.COMPLETED
    await_confirmation(source, ReturnMessage.SHUT, 0, "did not confirm that it has the guest")
    source.confirmed = True
    source.link.finish()
    return MigrationStatus.COMPLETED


def _send_rest(source: Source) -> None:
    if source.tail.stream_format(source.settings).switchover_start:
        write_command(source.link.writer, Command.SWITCHOVER_START)
    with source.passes.reporting():
        for saver in source.live:
            source.sections.end(saver)
    send_states(source, source.sections)
    source.link.writer.flush()


def send_states(source: Source, sections: SectionWriter) -> None:
    """The FULL sections, and the commands that sections have sent."""
    for saver in source.savers.state():
        if saver.needed():
            sections.full(saver)
    sections.write_commands()
    for section in source.tail.stored():
        sections.stored(section)
