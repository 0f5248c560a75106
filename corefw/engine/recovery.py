"""The phases of a postcopy whose connection broke, on the source.

    await_resume   postcopy-paused: wait for `migrate` with resume, or until it is time to dial again
    reconnect      postcopy-recover-setup: dial
    recover        postcopy-recover: ask what has arrived, RESUME; wait for RESUME_ACK

Each of them goes back to postcopy-paused if the new connection breaks too.

Source: QEMU 10.0, postcopy_pause, postcopy_do_resume (migration/migration.c). Threads: the migration thread.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from corefw.engine.identity import Purpose, prove_source
from corefw.engine.precopy import await_confirmation
from corefw.engine.preempt import CAPABILITY as PREEMPT
from corefw.engine.source import Source
from corefw.errors import (
    ANYTHING,
    ChannelClosed,
    ChannelError,
    Interrupted,
    MigfwError,
    PeerError,
    StreamError,
    described,
)
from corefw.states import MigrationStatus
from corefw.wire.constants import RESUMED, Command, ReturnMessage
from corefw.wire.records import read_received_bitmap, write_command
from corefw.wire.returnpath import ReturnMessageRecord, parse_recv_bitmap, recv_bitmap_body
from corefw.wire.stream import StreamReader

log = logging.getLogger(__name__)


# -- postcopy-paused ---------------------------------------------------------------------------------------------------


def pause(source: Source, error: BaseException) -> MigrationStatus:
    """The connection broke, or something else went wrong after the guest was handed over. Returns the next status;
    raises if the migration is to end."""
    link = source.link
    if not source.custody.handed_over or source.interrupt.is_set():
        raise error
    if isinstance(error, ChannelError | StreamError):
        link.await_last_words()
    path = link.return_path
    if path is not None and source.has_failed_there:
        path.check()
    if path is not None and path.accepted:
        link.finish()
    else:
        link.abort()
    if path is not None:
        path.join()
        if path.accepted:
            source.confirmed = True
            source.statistics.error = None
            return MigrationStatus.COMPLETED
    source.statistics.error = _reason(source, error)
    dialling_may_help = isinstance(error, ChannelError | StreamError | OSError) and not link.paused
    source.reconnection.broke(possible=dialling_may_help and source.transport.features.multi_channel)
    source.expect_resume()
    log.warning("postcopy is paused: %s", source.statistics.error)
    return MigrationStatus.POSTCOPY_PAUSED


def _reason(source: Source, error: BaseException) -> str:
    """What went wrong first. Raises PeerError if the destination reported that it failed."""
    if not isinstance(error, MigfwError):
        log.error("the migration thread failed", exc_info=error)
        return f"internal error: {described(error)}"
    try:
        source.link.check()
    except PeerError as failure:
        if source.has_failed_there:
            raise
        return str(failure)
    except Interrupted:
        pass  # so it was not the return path that broke
    except MigfwError as cause:
        if isinstance(error, ChannelError):  # it follows from the other
            closed = isinstance(cause, ChannelClosed)  # there is no result to report yet
            return f"{source.link.channel.peer} closed the connection" if closed else str(cause)
    return "its connection was closed by migrate-pause" if source.link.paused else str(error)


def await_resume(source: Source) -> MigrationStatus:
    """Wait for `migrate` with resume. Meanwhile the guest stays stopped here, and what is to be sent stays known."""
    source.link.close()
    source.requests.forget()
    source.await_transport()
    return MigrationStatus.POSTCOPY_RECOVER_SETUP


# -- postcopy-recover-setup --------------------------------------------------------------------------------------------


def reconnect(source: Source) -> MigrationStatus:
    """Dial the destination, and make sure that it is the same one. The stream will go on where it was: it has no second
    header, and the return path is taken to be open."""
    source.replace_link()
    try:
        source.link.connect()
        source.interrupt.check()
        if source.secret is not None:
            with source.link.awaiting():
                prove_source(source.link.channel, source.secret, Purpose.STREAM)
        # The confirmation may be all that was lost, or is worth knowing. A QEMU that has ended repeats nothing.
        is_rest = source.all_sent or not source.on_demand()
        source.read_return_path(may_end=source.secret is not None and is_rest)
        source.sections = source.sections.onto(source.link.writer)
    except ANYTHING as error:
        return pause(source, error)
    return MigrationStatus.POSTCOPY_RECOVER


# -- postcopy-recover --------------------------------------------------------------------------------------------------


def recover(source: Source) -> MigrationStatus:
    """Learn what has arrived, and have the destination go on."""
    try:
        _reopen_requested(source)
        bitmaps = ReceivedBitmaps(source)
        for saver in source.later():
            saver.prepare_resume(bitmaps.ask)
        source.serve_requests()
        source.link.answers.expect(ReturnMessage.RESUME_ACK, RESUMED)
        write_command(source.link.writer, Command.POSTCOPY_RESUME)
        source.link.writer.flush()
        await_confirmation(source, ReturnMessage.RESUME_ACK, RESUMED, "did not answer POSTCOPY_RESUME")
    except ANYTHING as error:
        return pause(source, error)
    source.statistics.error = None
    source.reconnection.succeeded(bitmaps.arrived)
    return MigrationStatus.POSTCOPY_ACTIVE


def _reopen_requested(source: Source) -> None:
    """Open the channel of requested pages anew, if they are to have one: a migfw takes it once it reads the stream."""
    source.requested = None
    if source.settings.capability(PREEMPT):
        source.link.ping(1)
        source.link.writer.flush()
        if source.secret is not None:
            await_confirmation(source, ReturnMessage.PONG, 1, "did not answer the first PING")
        else:
            source.open_requested_early()
        source.open_requested()


class ReceivedBitmaps:
    """Asks the destination which pages have arrived (QEMU 10.0, ram_dirty_bitmap_sync_all).

    `ask` is called in the migration thread, the object itself in the return path's.

    arrived   how many pages have, in all blocks that were asked for
    """

    def __init__(self, source: Source) -> None:
        self.arrived = 0
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
        self.arrived += int(np.count_nonzero(self._received))
        return self._received

    def __call__(self, record: ReturnMessageRecord, reader: StreamReader) -> None:
        """Raises StreamError for another block than the one that was asked for."""
        block = parse_recv_bitmap(record.body)
        if block != self._block:
            raise StreamError(f"return path: expected the bitmap of RAM block '{self._block}', got that of '{block}'")
        self._received = read_received_bitmap(reader, self._pages)
        self._source.link.answers.note(ReturnMessage.RECV_BITMAP, self._number)
