"""The phases of a precopy migration on the destination.

    set_up       wait for a source (and answer those that only ask); header, configuration, the first commands
    load_guest   the sections to the end of the stream; start the guest

Source: QEMU 10.0, process_incoming_migration_co and _bh (migration/migration.c). Threads: the incoming thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from corefw.engine.checking import MAGIC as CHECK_MAGIC
from corefw.engine.checking import PATIENCE, answer_check
from corefw.engine.commands import handlers_for
from corefw.engine.connection import Connection
from corefw.engine.destination import Destination
from corefw.engine.loader import load_beginning, load_frames
from corefw.engine.scheduling import yielding_to_guests
from corefw.errors import ANYTHING, FOREIGN, ChannelError, Interrupted, MigfwError, RemoteStreamError, StreamError
from corefw.machine import RunState
from corefw.section import MultiChannelLoader, RunStateLoader
from corefw.states import MigrationStatus
from corefw.wire.constants import BE32, FILE_MAGIC
from corefw.wire.frames import FrameReader

log = logging.getLogger(__name__)

MAGIC: Final = BE32.pack(FILE_MAGIC)


# -- setup -------------------------------------------------------------------------------------------------------------


def set_up(destination: Destination) -> MigrationStatus:
    """Wait for a source, and load everything before its first section."""
    try:
        if destination.accepts_again:
            _await_migration(destination)
        else:
            _await_only_connection(destination)
    finally:
        destination.preallocation.stop()
    destination.interrupt.check()
    frames = FrameReader(destination.connection.reader, footers=destination.tail.footers(destination.settings))
    destination.frames = frames
    destination.commands = handlers_for(destination.loaders)
    with _naming_offset(destination), yielding_to_guests():
        destination.set_loaders_up()
        load_beginning(destination)
    return MigrationStatus.ACTIVE


def _await_only_connection(destination: Destination) -> None:
    """The listener has one connection to give: it counts whatever it brings, and its first byte may take as long as it
    likes (exec: may be a command that listens itself)."""
    connection = destination.accept()
    connection.source.allow_pause()
    connection.reader.peek(1)
    connection.source.forbid_pause()


def _await_migration(destination: Destination) -> None:
    """Wait for a connection that brings a migration. Answer those that bring a check (checking.py), and turn away all
    others (a port scanner, a browser) with one line in the log."""
    while True:
        connection = destination.accept()
        if _brings_migration(destination, connection):
            return
        destination.hang_up()


def _brings_migration(destination: Destination, connection: Connection) -> bool:
    peer = connection.channel.peer
    try:
        head = connection.reader.peek(len(MAGIC))
    except Interrupted:
        raise
    except ChannelError as error:
        _ignore(f"a connection carried no migration: {error}")
        return False
    if head == CHECK_MAGIC:
        _answer_check(destination, connection)
    elif len(head) < len(MAGIC):
        _ignore(f"a connection ({peer}) ended after {len(head)} bytes")
    elif head != MAGIC:
        _ignore(f"a connection ({peer}) began with the bytes {head.hex(' ')}, expected a migration stream ('QEVM')")
    return head == MAGIC


def _ignore(problem: str) -> None:
    log.warning("%s (ignored; the destination keeps waiting)", problem)


def _answer_check(destination: Destination, connection: Connection) -> None:
    """The whole conversation has PATIENCE seconds; however it goes, the destination keeps waiting."""
    limit = threading.Timer(PATIENCE, connection.abort)
    limit.daemon = True
    limit.start()
    try:
        connection.reader.read(len(CHECK_MAGIC), "the magic number")
        answer_check(
            connection.reader, connection.channel, destination.machine, destination.settings, destination.loaders
        )
    except MigfwError as error:
        destination.interrupt.check()
        log.info("%s: a check was aborted: %s", connection.channel.peer, error)
    except FOREIGN:  # a machine is a plugin, and may do anything with what came
        log.exception("%s: a check failed", connection.channel.peer)
    finally:
        limit.cancel()


@contextmanager
def _naming_offset(destination: Destination) -> Iterator[None]:
    """Say in errors of the channel how much of the stream had been read."""
    try:
        yield
    except ChannelError as error:
        offset = destination.connection.reader.offset
        raise ChannelError(f"{error} (at offset {offset} of the stream)") from error


# -- active ------------------------------------------------------------------------------------------------------------


def load_guest(destination: Destination) -> MigrationStatus:
    """Load the stream to its end, and start the guest; or load it up to a command that changes the phase."""
    if not any(isinstance(loader, MultiChannelLoader) and loader.takes_channels() for loader in destination.loaders):
        destination.turn_others_away()
    with _naming_offset(destination), _explaining_multifd(destination), yielding_to_guests():
        following = load_frames(destination, destination.frames)
    if following is not None:
        return following
    if destination.guest is not None:
        raise StreamError("expected POSTCOPY_RUN, got the end of the stream")
    destination.clean_loaders_up()
    with destination.guest_lock.unless(destination.interrupt.check):
        destination.interrupt.check()
        start_guest(destination)
    return MigrationStatus.COMPLETED


@contextmanager
def _explaining_multifd(destination: Destination) -> Iterator[None]:
    """A stream that ends before its first pass may be one whose pages go over channels that cannot reach us."""
    try:
        yield
    except RemoteStreamError as error:
        if destination.progress.passes_began or not destination.connection.reader.ended:
            raise
        got = f"{error.got} (a source whose capability 'multifd' is on fails here: switch it off there)"
        raise RemoteStreamError(error.offset, error.where, error.expected, got) from None


def start_guest(destination: Destination) -> None:
    """Bring the guest into the run state that the source had (process_incoming_migration_bh). Under the guest lock."""
    machine = destination.machine
    carried = [loader.run_state() for loader in destination.loaders if isinstance(loader, RunStateLoader)]
    sent = next((state for state in carried if state is not None), RunState.RUNNING)
    wanted = destination.tail.run_state(sent)
    if wanted is not RunState.RUNNING:
        machine.set_run_state(wanted)
    elif not destination.autostart():
        machine.set_run_state(RunState.PAUSED)
    else:
        try:
            machine.start()
        except ANYTHING:
            if machine.run_state is not RunState.RUNNING:
                raise
            log.exception("the guest has arrived and runs, but an observer of it failed")
