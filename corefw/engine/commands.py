"""The stream commands that a destination runs, one function each. Loaders add their own (SectionLoader.commands).

A handler is given the state of the migration, the frame that the command came in (the stream's, or that of a package),
and the record. It returns the status to go on with, which ends the present phase, or None to go on in it.

Source: QEMU 10.0, loadvm_process_command (migration/savevm.c). Threads: the one that loads the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final

from corefw.engine import postcopy_commands
from corefw.engine.destination import Destination
from corefw.engine.switchover import SwitchoverAck
from corefw.errors import MigfwError, PluginError
from corefw.section import SectionLoader
from corefw.states import MigrationStatus
from corefw.wire.constants import ALIVE_PING, MIGFW_PING, PLUGIN_COMMANDS, Command
from corefw.wire.frames import FrameReader
from corefw.wire.records import CommandRecord, parse_ping, parse_postcopy_advise

Handler = Callable[[Destination, FrameReader, CommandRecord], MigrationStatus | None]


def handlers_for(loaders: Iterable[SectionLoader]) -> dict[int, Handler]:
    """The engine's own handlers and those of the loaders. Raises PluginError if a loader claims a command that another
    one has, or that is not for plugins."""
    found: dict[int, Handler] = dict(HANDLERS)
    for loader in loaders:
        for number, take in loader.commands().items():
            if number in found or number not in FOR_LOADERS:
                raise PluginError(f"section {loader.key}: command {number:#x} is not free for it")
            found[number] = partial(_pass_payload, take)
    return found


def _pass_payload(take: Callable[[bytes], None], _: Destination, __: FrameReader, record: CommandRecord) -> None:
    take(record.payload)


def run_command(destination: Destination, frames: FrameReader, record: CommandRecord) -> MigrationStatus | None:
    """Run one. Raises RemoteStreamError for a command that nothing here takes, and for one that fails."""
    run = destination.commands.get(record.command)
    if run is None:
        why = ""
        if isinstance(record.command, Command):
            why = f", which {belongs_to(_capability_of(record))}"
        raise frames.reader.error("a command that is known here", f"{record.name}{why}")
    try:
        return run(destination, frames, record)
    except MigfwError as error:
        raise frames.reader.error(f"{record.name} to succeed", str(error)) from error


def _open_return_path(destination: Destination, frames: FrameReader, _: CommandRecord) -> None:
    connection = destination.connection
    if connection.return_path is not None:
        raise frames.reader.error("OPEN_RETURN_PATH once", "it again")
    path = connection.open_return_path()
    policy = destination.tail.ack_policy(destination.progress.configuration, destination.settings)
    destination.switchover_ack = SwitchoverAck(path, policy)


def _ping(destination: Destination, frames: FrameReader, record: CommandRecord) -> None:
    connection = destination.connection
    if connection.return_path is None:
        raise frames.reader.error("OPEN_RETURN_PATH before PING", "PING")
    number = parse_ping(record.payload)
    if number == MIGFW_PING:
        connection.from_migfw = True
        connection.source.expect_signs()
    path = connection.return_path
    if destination.guest is None or number == ALIVE_PING:
        path.pong(number)
    else:  # until the guest has started, the source keeps what it has sent
        destination.guest.when_started(partial(path.pong, number))


def _note_switchover(destination: Destination, frames: FrameReader, _: CommandRecord) -> None:
    """QEMU announces the END sections with it, for devices that load their state in threads; nothing here does."""
    progress = destination.progress
    if progress.switchover_started:
        raise frames.reader.error("SWITCHOVER_START once", "it again")
    if not progress.opened:
        raise frames.reader.error("SWITCHOVER_START before the END of the live sections", "it after them")
    progress.switchover_started = True


FOR_LOADERS: Final = frozenset({*PLUGIN_COMMANDS, Command.ENABLE_COLO})
"""Commands that a loader may take: those of plugins, and QEMU's that the engine does not run itself."""

HANDLERS: Final[Mapping[int, Handler]] = {
    Command.OPEN_RETURN_PATH: _open_return_path,
    Command.PING: _ping,
    Command.SWITCHOVER_START: _note_switchover,
    Command.POSTCOPY_ADVISE: postcopy_commands.advise,
    Command.POSTCOPY_RAM_DISCARD: postcopy_commands.discard,
    Command.POSTCOPY_LISTEN: postcopy_commands.listen,
    Command.POSTCOPY_RUN: postcopy_commands.run,
    Command.RECV_BITMAP: postcopy_commands.receive_bitmap,
    Command.POSTCOPY_RESUME: postcopy_commands.resume,
}

_CAPABILITIES: Final[Mapping[int, str]] = {Command.ENABLE_COLO: "x-colo"}
"""Command -> the capability of the source that makes it send the command, where that is not postcopy-ram."""


def _capability_of(record: CommandRecord) -> str:
    if record.command is Command.POSTCOPY_ADVISE and parse_postcopy_advise(record.payload) is None:
        return "dirty-bitmaps"
    return _CAPABILITIES.get(record.command, "postcopy-ram")


def belongs_to(capability: str) -> str:
    return f"belongs to the source's capability '{capability}' (switch it off there: no installed plugin supports it)"
