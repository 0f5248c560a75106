"""The phase postcopy-active on the source: the guest runs on the destination while the rest of its RAM follows.

RAM_DISCARD; PACKAGED with LISTEN, FULL sections and RUN; then PART sections, requested pages first; END sections, EOF;
wait for SHUT.

Once RUN may have been sent, no failure ends the migration: it pauses (recovery.py). Only the destination's own word
that it could not start the guest ends it, and then the guest runs on here. docs/postcopy-protocol.md has the protocol.

Source: QEMU 10.0, postcopy_start, migration_completion_postcopy (migration/migration.c). Threads: the migration thread.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Final

from corefw.engine.precopy import await_confirmation, send_states
from corefw.engine.recovery import pause
from corefw.engine.release import MemoryRelease
from corefw.engine.scheduling import run_behind_requests
from corefw.engine.source import Source
from corefw.errors import ANYTHING
from corefw.states import MigrationStatus
from corefw.wire.constants import PACKAGE_PING, Command, ReturnMessage, SectionType
from corefw.wire.records import write_command, write_package
from corefw.wire.stream import MemorySink, StreamWriter

log = logging.getLogger(__name__)

PART: Final = 128 << 10
"""Bytes of a PART where requested pages wait for it: at most, but for those pages themselves. As many may lie in the
source's socket."""
FIRST_PART_BESIDE: Final = 2 << 20
LEAST_PART_BESIDE: Final = 512 << 10
MOST_PART_BESIDE: Final = 16 << 20
"""The same where requested pages have a channel of their own, for the first PART and for those that follow. The fewer
PARTs there are, the less the interpreter is in their way, on both sides. The section 'ram' sends them in pieces."""
QUICK, SLOW = 0.02, 0.1
"""Seconds. A PART that took less is followed by a longer one, and one that took more by a shorter one, since the engine
looks at nothing else meanwhile."""
UNSENT: Final = 512 << 10
"""Bytes that may lie in the source's socket then."""


def send_rest(source: Source) -> MigrationStatus:
    """Hand the guest over, unless that was done before the connection broke, and send what is left of it."""
    try:
        if not source.custody.handed_over:
            _hand_over(source)
        run_behind_requests(partial(_send_pages, source))
        await_confirmation(source, ReturnMessage.SHUT, 0, "did not confirm that it has the whole guest")
    except ANYTHING as error:
        return pause(source, error)
    source.confirmed = True
    source.link.finish()
    MemoryRelease(source).finish()
    return MigrationStatus.COMPLETED


def _hand_over(source: Source) -> None:
    """The guest is stopped. Send what it needs to run on the destination, and have it run there."""
    writer, later = source.link.writer, source.later()
    if source.tail.stream_format(source.settings).switchover_start:
        write_command(writer, Command.SWITCHOVER_START)
    for saver in source.live:
        if saver not in later:
            source.sections.end(saver)
    with source.passes.reporting():
        for saver in later:
            saver.begin_postcopy(writer)
    source.link.ping(2)
    package = _package(source)
    writer.flush()
    if source.requested is not None:
        source.requested.check()
    source.serve_requests()
    source.custody.hand_over_at_run(source.check)
    source.limits.end()
    try:
        write_package(writer, package)
        source.link.ping(4)
        writer.flush()
    finally:  # if it breaks on the way, the guest may run there all the same
        source.left_at = time.monotonic()
        source.statistics.handed_over()


def _package(source: Source) -> bytes:
    """A stream within the stream. The destination has all of it before it loads any, for with LISTEN another thread
    begins to read what comes behind."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_command(writer, Command.POSTCOPY_LISTEN)
    send_states(source, source.sections.onto(writer))
    source.link.ping(PACKAGE_PING, writer)
    write_command(writer, Command.POSTCOPY_RUN)
    writer.flush()
    return bytes(sink.data)


def _next_part(part: int, seconds: float) -> int:
    """How long the next PART may be, after one of at most `part` bytes took so long."""
    if seconds < QUICK:
        return min(2 * part, MOST_PART_BESIDE)
    return max(part // 2, LEAST_PART_BESIDE) if seconds > SLOW else part


def _send_pages(source: Source) -> None:
    """PARTs until nothing is left, then the end of the stream."""
    writer, sections, through = source.link.writer, source.sections, False
    release = MemoryRelease(source)
    part = PART if source.requested is None else FIRST_PART_BESIDE
    grows = source.requested is not None and not source.settings.capability("release-ram")
    source.link.channel.limit_unsent(min(part, UNSENT))
    source.meter.hold_at("max-postcopy-bandwidth")
    source.meter.start_window()
    while not through:
        source.check()
        if source.requested is not None:  # once it was closed, what is sent over it may vanish
            source.requested.check()
        source.link.beat()
        source.meter.pace()
        began = time.monotonic()
        only_requested = source.meter.is_ahead()
        through = not only_requested
        with source.requests.served(), source.meter.step() as budget, source.meter.unheld():
            for saver in source.on_demand() if only_requested else source.later():
                budget = 0 if only_requested else min(part, budget)
                through &= sections.part(saver, partial(saver.iterate, writer, budget))
                source.statistics.section(saver.key).update(saver.pending_estimate().total)
            release.step()
            writer.flush()
        source.meter.measure()
        if grows:
            part = _next_part(part, time.monotonic() - began)
    if source.requested is not None:
        source.requested.end(source.later())
    for saver in source.later():
        sections.end(saver)
    sections.write_commands()
    source.all_sent = True
    source.link.answers.expect(ReturnMessage.SHUT, 0)
    writer.u8(SectionType.EOF)
    writer.flush()
