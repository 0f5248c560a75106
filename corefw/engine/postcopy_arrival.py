"""The phases of postcopy on the destination: the guest runs here while the rest of its RAM arrives.

    receive_rest      postcopy-active: start the guest, and load the stream to its end
    await_recovery    postcopy-paused: the connection broke; wait for migrate-recover, and for the source
    load_recovery     postcopy-recover: answer what the source asks, until RESUME

Whatever goes wrong, the guest goes on here with the pages it has, and the migration pauses. The commands are in
postcopy_commands.py, the protocol in docs/postcopy-protocol.md.

Source: QEMU 10.0, postcopy_ram_listen_thread, postcopy_pause_incoming (migration/savevm.c). Threads: the incoming
thread.
"""

from __future__ import annotations

import logging

from corefw.engine.arrival import start_guest
from corefw.engine.destination import Destination
from corefw.engine.guestarrival import GuestArrival
from corefw.engine.loader import check_complete, load_frames
from corefw.engine.scheduling import run_behind_requests
from corefw.errors import ANYTHING, MigfwError, StreamError, described
from corefw.postcopy import OnDemandLoader, PostcopyLoader
from corefw.states import MigrationStatus

log = logging.getLogger(__name__)


# -- postcopy-active ---------------------------------------------------------------------------------------------------


def receive_rest(destination: Destination) -> MigrationStatus:
    """Start the guest, unless this is a migration that goes on, and load what is still to come."""
    guest = _guest(destination)
    check_complete(destination, destination.frames, "POSTCOPY_RUN", later=guest.sections)
    guest.start(lambda: _start(destination), destination.interrupt_load)
    if guest.is_whole:
        destination.stop_listening()
    else:
        guest.when_started(destination.expect_return)
    destination.connection.source.expect_signs()
    destination.resuming = False
    try:
        if run_behind_requests(lambda: load_frames(destination, destination.frames)) is not None:
            raise StreamError("expected the rest of the stream, got a command that begins another phase")
        _await_requested(destination)
        guest.faults.check_complete()
    except ANYTHING as error:
        return _pause(destination, error)
    guest.complete()
    return MigrationStatus.COMPLETED


def _await_requested(destination: Destination) -> None:
    """The stream has ended, but pages may still come over their own channel."""
    requested = destination.connection.requested
    if requested is not None:
        requested.await_rest(lambda: destination.settings.integer("x-migfw-incoming-timeout") / 1000)
        requested.close()


def _guest(destination: Destination) -> GuestArrival:
    assert destination.guest is not None, "POSTCOPY_LISTEN came before"
    return destination.guest


def _start(destination: Destination) -> None:
    with destination.guest_lock.unless(destination.interrupt.check):
        start_guest(destination)


# -- postcopy-paused ---------------------------------------------------------------------------------------------------


def _pause(destination: Destination, error: BaseException) -> MigrationStatus:
    """The connection broke, what came over it made no sense, or a plugin failed. The next status: a guest that is here
    whole has no need of the source. Raises if the migration is to end."""
    guest = _guest(destination)
    if destination.interrupt.is_set():
        guest.check()
        raise error
    if not isinstance(error, MigfwError):
        log.error("the rest of the guest could not be loaded", exc_info=error)
        error = MigfwError(f"internal error: {described(error)}")
    for loader in destination.loaders:
        if isinstance(loader, PostcopyLoader) and loader.key in guest.sections:
            loader.connection_lost()
    if guest.is_whole or _lacks_only_what_a_qemu_lost(destination):
        log.warning("postcopy: the connection broke, but the guest has arrived: %s", destination.cause(error))
        guest.complete()
        return MigrationStatus.COMPLETED
    destination.why_paused = str(destination.cause(error))
    log.warning("postcopy is paused, and the guest goes on with the pages it has: %s", destination.why_paused)
    guest.faults.request_over(None)
    destination.connection.abort()
    destination.hang_up()
    destination.expect_return(paused=True)
    return MigrationStatus.POSTCOPY_PAUSED


def _lacks_only_what_a_qemu_lost(destination: Destination) -> bool:
    """Whether all pages are here, and only dirty bitmaps are missing. If the connection breaks while a QEMU sends them,
    its migration waits for ever (5.2, 7.2) or fails (10.0, 11.1), so it does not come back. A migfw does."""
    guest, loaded = _guest(destination), destination.progress.loaded
    later = [one for one in destination.loaders if one.key in guest.sections]
    if destination.secret is not None or all(isinstance(one, OnDemandLoader) or one.key in loaded for one in later):
        return False
    try:
        guest.faults.check_complete()
    except StreamError:
        return False
    return True


def await_recovery(destination: Destination) -> MigrationStatus:
    """Wait until the source has come back (readmission.py)."""
    try:
        destination.readmit()
    except ANYTHING as error:
        return _pause(destination, error)
    _continue_stream(destination)
    return MigrationStatus.POSTCOPY_RECOVER


def _continue_stream(destination: Destination) -> None:
    """The stream goes on where it was, between two sections. A section whose END had begun to come ends again."""
    sections, progress = _guest(destination).sections, destination.progress
    progress.opened.update(sections)
    progress.loaded -= sections.keys()
    destination.frames = destination.frames.resumed(destination.connection.reader, sections.values())
    destination.resuming = True


# -- postcopy-recover --------------------------------------------------------------------------------------------------


def load_recovery(destination: Destination) -> MigrationStatus:
    """Run the commands of a source that resumes."""
    destination.connection.source.expect_signs()
    try:
        following = load_frames(destination, destination.frames)
        if following is None:
            raise StreamError("expected POSTCOPY_RESUME, got the end of the stream")
    except ANYTHING as error:
        return _pause(destination, error)
    destination.why_paused = None
    return following
