"""Loads the frame of a stream, or of a package in it: gives each section to its loader and runs the commands.

Every section must be known, in its place, of a version that its loader reads, and must end where its footer says.
Anything else aborts the load with RemoteStreamError. The frame itself is read in corefw.wire.frames.

Source: QEMU 7.2 and 10.0, qemu_loadvm_state_main and what it calls (migration/savevm.c).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Final

from corefw.engine.commands import belongs_to, run_command
from corefw.engine.coverage import not_loaded
from corefw.engine.destination import Destination
from corefw.errors import MigfwError, RemoteStreamError
from corefw.section import LiveLoader, SectionKey, SectionLoader
from corefw.states import MigrationStatus
from corefw.wire.constants import TARGET_PAGE_SIZE, Command, SectionType
from corefw.wire.frames import CommandItem, ConfigurationItem, Eof, FrameReader, Part, Section
from corefw.wire.records import (
    CommandRecord,
    Configuration,
    SectionHeader,
    configuration_capabilities,
    configuration_page_size,
    read_package,
)
from corefw.wire.stream import BUFFER_SIZE, MemorySource, StreamReader

DESCRIPTION_WAIT: Final = 1.0
"""Seconds to wait for a description from a source that does not end its stream: it comes right behind EOF, or never."""

UNREADABLE: Final = frozenset({"x-ignore-shared"})
"""Capabilities that a source names in the configuration section and that nothing here can load."""

_SECTION_CAPABILITIES: Final = {"block": "block", "dirty-bitmap": "dirty-bitmaps"}


# -- the beginning -----------------------------------------------------------------------------------------------------


def load_beginning(destination: Destination) -> None:
    """Load everything before the first section. Raises RemoteStreamError, ChannelError.

    A stream that cannot be loaded here is refused only behind its first commands: among them a source that is a migfw
    says that it reads reasons.
    """
    frames = destination.frames
    frames.next_event()  # the header
    refusal = _refusal_of_configuration(destination)
    if refusal is None:
        _run_first_commands(destination)
        return
    with suppress(MigfwError):
        _run_first_commands(destination)
    raise refusal


def _run_first_commands(destination: Destination) -> None:
    frames = destination.frames
    while frames.peek_type() == SectionType.COMMAND:
        event = frames.next_event()
        assert isinstance(event, CommandItem)
        if _run(destination, frames, event.record) is not None:
            raise frames.reader.error("the sections before POSTCOPY_RUN", "it in the first commands")


def _refusal_of_configuration(destination: Destination) -> RemoteStreamError | None:
    """Read the configuration section, if there is one: why its stream cannot be loaded here, or None. Raises what is
    wrong with the section itself."""
    frames, progress = destination.frames, destination.progress
    at = frames.reader.offset
    if frames.peek_type() == SectionType.CONFIGURATION:
        event = frames.next_event()
        assert isinstance(event, ConfigurationItem)
        progress.configuration = event.configuration
    try:
        destination.tail.check_configuration(progress.configuration, destination.settings, at)
        if progress.configuration is not None:
            _check_layout(progress.configuration, at)
            destination.stream_capabilities = configuration_capabilities(progress.configuration)
    except RemoteStreamError as error:
        return error
    return None


def _check_layout(configuration: Configuration, at: int) -> None:
    page_size = configuration_page_size(configuration)
    if page_size not in (None, TARGET_PAGE_SIZE):
        expected = f"target pages of {TARGET_PAGE_SIZE} bytes"
        raise RemoteStreamError(at, "configuration", expected, f"{page_size} bytes")
    if elsewhere := UNREADABLE & configuration_capabilities(configuration):
        got = f"capability '{min(elsewhere)}', which puts them elsewhere (switch it off on the source)"
        raise RemoteStreamError(at, "configuration", "all pages in the stream", got)


# -- sections and commands ---------------------------------------------------------------------------------------------


def load_frames(destination: Destination, frames: FrameReader) -> MigrationStatus | None:
    """Load to the end of the stream or package that `frames` reads, and return None; or until a command returns the
    status to go on with, and return that: then `frames` is behind the command, and can be gone on with.

    Two threads may load at once, one the stream and the other a package of it. Raises StreamError, ChannelError,
    MachineError.
    """
    while True:
        _await_next(destination, frames)
        if _load_tail(destination, frames):
            return None
        event = frames.next_event()
        match event:
            case Section():
                _load_section(destination, frames, event)
            case Part():
                _load_part(destination, frames, event)
            case CommandItem():
                status = _run(destination, frames, event.record)
                if status is not None:
                    return status
            case Eof():
                check_complete(destination, frames, "the end of the stream")
                _read_description(destination, frames)
                return None
            case None:
                return None


def _run(destination: Destination, frames: FrameReader, record: CommandRecord) -> MigrationStatus | None:
    run = _load_package if record.command is Command.PACKAGED else run_command
    return run(destination, frames, record)


def _load_package(destination: Destination, frames: FrameReader, record: CommandRecord) -> MigrationStatus | None:
    """The device state of a postcopy. All of it is here before any is loaded."""
    data = read_package(frames.reader, record)
    package = frames.inside(StreamReader(MemorySource(data), size=max(1, min(len(data), BUFFER_SIZE))))
    status = load_frames(destination, package)
    if status is not None and package.next_event() is not None:
        raise package.reader.error("the end of the package", "more of it")
    return status


def _await_next(destination: Destination, frames: FrameReader) -> None:
    """Wait for the first byte of the next event. Once a live section has begun the source may be silent before it: it
    waits for its bandwidth, for migrate-continue, for its guest to stop. One that resumes has nothing to wait for."""
    source = destination.connection.source
    if destination.progress.live_ids and not destination.resuming:
        source.allow_pause()
    frames.peek_type()
    source.forbid_pause()


def _load_section(destination: Destination, frames: FrameReader, event: Section) -> None:
    header, progress = event.header, destination.progress
    loader = _loader_for(destination, frames, header)
    if header.type is SectionType.FULL:
        _load_body(frames, header, loader)
        progress.loaded.add(loader.key)
        return
    if not isinstance(loader, LiveLoader):
        raise frames.reader.error(f"section {loader.key} as FULL", "START")
    progress.opened[loader.key] = header
    progress.live_ids[loader.key] = header.section_id
    _load_body(frames, header, loader)


def _load_part(destination: Destination, frames: FrameReader, event: Part) -> None:
    header, progress = event.header, destination.progress
    loader = destination.loaders.find(SectionKey(header.idstr, header.instance_id))
    assert loader is not None, "it was found for the START"
    progress.passes_began = True
    _load_body(frames, header, loader)
    if event.type is SectionType.END:
        progress.opened.pop(loader.key, None)
        progress.loaded.add(loader.key)
    elif destination.switchover_ack is not None:
        destination.switchover_ack.part_loaded()


def _load_body(frames: FrameReader, header: SectionHeader, loader: SectionLoader) -> None:
    frames.reader.where = f"section {loader.key}"
    loader.load(frames.reader, header.version_id)


def _loader_for(destination: Destination, frames: FrameReader, header: SectionHeader) -> SectionLoader:
    """The loader of a START or FULL; checks that it may come now, and its version."""
    reader, progress = frames.reader, destination.progress
    key = SectionKey(header.idstr, header.instance_id)
    loader = destination.loaders.find(key)
    if loader is None:
        known = ", ".join(str(one.key) for one in destination.loaders)
        why = _explain_unknown(destination, header)
        raise reader.error(f"one of the sections {known}", f"section {key}{why}")
    if key in progress.loaded or key in progress.opened:
        raise reader.error(f"section {key} once", "it again")
    if not loader.minimum_version <= header.version_id <= loader.version_id:
        raise reader.error(
            f"section {key} of a version from {loader.minimum_version} to {loader.version_id}",
            f"version {header.version_id}",
        )
    return loader


def _explain_unknown(destination: Destination, header: SectionHeader) -> str:
    if header.idstr in _SECTION_CAPABILITIES:
        return f", which {belongs_to(_SECTION_CAPABILITIES[header.idstr])}"
    return destination.tail.explain_unknown(header, destination.progress)


# -- the end -----------------------------------------------------------------------------------------------------------


def _load_tail(destination: Destination, frames: FrameReader) -> bool:
    """Give the rest of the stream to a machine that keeps it as it is, if the next section begins it."""
    connection = destination.connection

    def live(seconds: float) -> bool:
        """A source that gets no answer ends its stream, so there is no need to guess from silence: the next read blocks
        until there is more, or the end."""
        return connection.return_path is None or connection.source.wait_readable(seconds)

    def check(came: str) -> None:
        check_complete(destination, frames, came)

    return destination.tail.load_rest(frames, destination.progress, check, live)


def check_complete(
    destination: Destination, frames: FrameReader, came: str, later: Collection[SectionKey] = ()
) -> None:
    """Raise RemoteStreamError if something is missing; `came` is what came instead. `later`: live sections that may
    still be incomplete."""
    reader, progress = frames.reader, destination.progress
    if unfinished := [header for key, header in progress.opened.items() if key not in later]:
        raise reader.error(f"the END of {unfinished[0]}", came)

    def is_here(loader: SectionLoader) -> bool:
        return progress.is_loaded(loader) or loader.key in later

    for loader in destination.loaders:
        if loader.required() and not is_here(loader):
            raise reader.error(f"section {loader.key}", came)
    missing = not_loaded(destination.machine, destination.loaders, is_here)
    if missing is not None:
        raise reader.error(missing, f"{came}; no section that came carries it")


def _read_description(destination: Destination, frames: FrameReader) -> None:
    """Nothing here needs it, but it belongs to the stream: a cut one means that the stream was cut. A postcopy has
    none."""
    if destination.guest is not None:
        return
    connection = destination.connection
    start, end = frames.reader.span()
    if start == end and connection.return_path is not None:
        wait = DESCRIPTION_WAIT if destination.settings.property("send-vmdescription") else 0
        if not connection.source.wait_readable(wait):
            return
    frames.next_event()
