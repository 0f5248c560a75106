"""The phases of postcopy on the source: the guest runs on the destination while the rest of its RAM follows.

    send_rest      RAM_DISCARD; PACKAGED with LISTEN, FULL sections and RUN; then PART sections, requested pages first;
                   END sections, EOF; wait for SHUT
    await_resume   postcopy-paused: the connection broke; wait for `migrate` with resume
    recover        over a new connection: ask what has arrived, RESUME; wait for RESUME_ACK

Once RUN may have been sent, no failure of the connection ends the migration: it pauses. Only the destination's own word
that it could not start the guest does, and then the guest runs on here. docs/decisions/postcopy.md has the protocol.

Source: QEMU 10.0, postcopy_start, migration_completion_postcopy, postcopy_pause, postcopy_do_resume
(migration/migration.c). Threads: the migration thread.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.engine.pagerequests import PageRequests
from corefw.engine.precopy import await_confirmation, send_states
from corefw.engine.source import Source
from corefw.errors import ChannelError, Interrupted, MigfwError, PeerError, StreamError
from corefw.section import PostcopySaver
from corefw.states import MigrationStatus
from corefw.wire.constants import PACKAGE_PING, RESUMED, Command, ReturnMessage, SectionType
from corefw.wire.records import read_received_bitmap, write_command, write_package
from corefw.wire.returnpath import ReturnMessageRecord, parse_recv_bitmap, recv_bitmap_body
from corefw.wire.stream import MemorySink, StreamReader, StreamWriter

log = logging.getLogger(__name__)

BUDGET: Final = 512 << 10
"""Bytes of a PART, at most: a page that the guest waits for is sent after them, and after what the socket holds."""


# -- postcopy-active ---------------------------------------------------------------------------------------------------


def send_rest(source: Source) -> MigrationStatus:
    """Hand the guest over, unless that was done before the connection broke, and send what is left of it."""
    try:
        if not source.custody.handed_over:
            _hand_over(source)
        _send_pages(source)
        await_confirmation(source, ReturnMessage.SHUT, 0, "did not confirm that it has the whole guest")
    except (ChannelError, StreamError) as error:
        return _pause(source, error)
    source.confirmed = True
    source.link.finish()
    return MigrationStatus.COMPLETED


def _hand_over(source: Source) -> None:
    """The guest is stopped. Send what it needs to run on the destination, and have it run there."""
    writer, later = source.link.writer, _later(source)
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
    _serve_requests(source)
    source.custody.hand_over_at_run(source.check)
    source.limits.end()
    try:
        write_package(writer, package)
        source.link.ping(4)
        writer.flush()
    finally:  # if it breaks on the way, the guest may run there all the same
        source.left_at = time.monotonic()
        source.statistics.handed_over()


def _later(source: Source) -> list[PostcopySaver]:
    """The savers of what may follow once the guest runs there."""
    return [saver for saver in source.live if isinstance(saver, PostcopySaver) and saver.follows_later()]


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


def _send_pages(source: Source) -> None:
    """PARTs until nothing is left, then the end of the stream."""
    writer, sections, through = source.link.writer, source.sections, False
    source.meter.hold_at("max-postcopy-bandwidth")
    source.meter.start_window()
    while not through:
        source.check()
        through = True
        with source.requests.served(), source.meter.step() as budget:
            for saver in _later(source):
                through &= sections.part(saver, partial(saver.iterate, writer, min(BUDGET, budget)))
                source.statistics.section(saver.key).update(saver.pending_estimate().total)
            writer.flush()
        source.meter.measure()
    for saver in _later(source):
        sections.end(saver)
    sections.write_commands()
    source.link.answers.expect(ReturnMessage.SHUT, 0)
    writer.u8(SectionType.EOF)
    writer.flush()


def _serve_requests(source: Source) -> None:
    """From now on the destination may ask for pages."""
    source.requests = PageRequests(_later(source), source.meter)
    for message in (ReturnMessage.REQ_PAGES, ReturnMessage.REQ_PAGES_ID):
        source.link.answers.handle(message, source.requests)


# -- postcopy-paused ---------------------------------------------------------------------------------------------------


def _pause(source: Source, error: ChannelError | StreamError) -> MigrationStatus:
    """The connection broke, or what came over it made no sense. The next status; raises if there is none to go on."""
    link = source.link
    if not source.custody.handed_over or source.interrupt.is_set():
        raise error
    link.await_last_words()
    link.abort()
    path = link.return_path
    if path is not None:
        path.join()
        if path.accepted:
            source.confirmed = True
            return MigrationStatus.COMPLETED
    reason = str(error)
    try:
        link.check()
    except PeerError:
        raise
    except Interrupted:  # so it was not the return path that broke
        if isinstance(error, Interrupted):
            reason = "its connection was closed by migrate-pause"
    except MigfwError as cause:
        reason = str(cause)
    source.statistics.error = reason
    source.expect_resume()
    log.warning("postcopy is paused: %s", reason)
    return MigrationStatus.POSTCOPY_PAUSED


def await_resume(source: Source) -> MigrationStatus:
    """Wait for `migrate` with resume. Meanwhile the guest stays stopped here, and what is to be sent stays known."""
    source.link.close()
    source.requests.forget()
    source.connect_over(source.await_transport())
    return MigrationStatus.POSTCOPY_RECOVER


# -- postcopy-recover --------------------------------------------------------------------------------------------------


def recover(source: Source) -> MigrationStatus:
    """Connect again, learn what has arrived, and have the destination go on."""
    try:
        _reconnect(source)
        bitmaps = ReceivedBitmaps(source)
        for saver in _later(source):
            saver.prepare_resume(bitmaps.ask)
        _serve_requests(source)
        source.link.answers.expect(ReturnMessage.RESUME_ACK, RESUMED)
        write_command(source.link.writer, Command.POSTCOPY_RESUME)
        source.link.writer.flush()
        await_confirmation(source, ReturnMessage.RESUME_ACK, RESUMED, "did not answer POSTCOPY_RESUME")
    except (ChannelError, StreamError) as error:
        return _pause(source, error)
    source.statistics.error = None
    return MigrationStatus.POSTCOPY_ACTIVE


def _reconnect(source: Source) -> None:
    """The stream goes on where it was: it has no second header, and the return path is taken to be open."""
    source.link.connect()
    source.read_return_path()
    source.sections = source.sections.onto(source.link.writer)


class ReceivedBitmaps:
    """Asks the destination which pages have arrived (QEMU 10.0, ram_dirty_bitmap_sync_all).

    `ask` is called in the migration thread, the object itself in the return path's.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._number = 0
        self._block, self._pages = "", 0
        self._received = np.empty(0, dtype=np.bool_)
        source.link.answers.handle(ReturnMessage.RECV_BITMAP, self)

    def ask(self, block: str, pages: int) -> NDArray[np.bool_]:
        """For each of the block's pages, whether it has arrived. Raises ChannelError, StreamError."""
        link = self._source.link
        self._number += 1
        self._block, self._pages = block, pages
        link.answers.expect(ReturnMessage.RECV_BITMAP, self._number)
        write_command(link.writer, Command.RECV_BITMAP, recv_bitmap_body(block))
        link.writer.flush()
        complaint = f"did not say which pages of RAM block '{block}' have arrived"
        await_confirmation(self._source, ReturnMessage.RECV_BITMAP, self._number, complaint)
        self._source.note_started_there()
        return self._received

    def __call__(self, record: ReturnMessageRecord, reader: StreamReader) -> None:
        """Raises StreamError for another block than the one that was asked for."""
        block = parse_recv_bitmap(record.body)
        if block != self._block:
            raise StreamError(f"return path: expected the bitmap of RAM block '{self._block}', got that of '{block}'")
        self._received = read_received_bitmap(reader, self._pages)
        self._source.link.answers.note(ReturnMessage.RECV_BITMAP, self._number)
