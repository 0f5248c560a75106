"""Loads a stream on the destination: gives each section to its loader and runs the commands.

Every section must be known, in its place, of a version that its loader reads, and must end where its footer says.
Anything else aborts the load with RemoteStreamError.

Source: QEMU 7.2's qemu_loadvm_state_main and what it calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from corefw.engine.coverage import not_loaded
from corefw.engine.returnpath import ReturnPathWriter
from corefw.engine.switchover import SwitchoverAck
from corefw.errors import MigfwError, RemoteStreamError
from corefw.machine import AdoptsStreams, Machine, StreamFormat
from corefw.section import LiveLoader, LoaderRegistry, SectionKey, SectionLoader
from corefw.settings import Settings
from corefw.wire.constants import MIGFW_PING, TARGET_PAGE_SIZE, Command, SectionType
from corefw.wire.records import (
    MAPPED_RAM,
    CommandRecord,
    Configuration,
    SectionHeader,
    configuration_capabilities,
    configuration_page_size,
    parse_ping,
    parse_postcopy_advise,
    read_command,
    read_configuration_body,
    read_description_body,
    read_footer,
    read_header,
    read_part_header,
    read_section_header,
    without_capabilities,
)
from corefw.wire.stream import StreamReader

log = logging.getLogger(__name__)

DESCRIPTION_WAIT: Final = 1.0
"""Seconds to wait for a description where the source does not end its stream: it comes in the same breath as EOF, or
never."""

UNREADABLE: Final = frozenset({"x-ignore-shared"})
"""Capabilities that a source names in the configuration section and that nobody here can load."""

ONCE: Final = frozenset({MAPPED_RAM})
"""Those that say how this stream lies in its file: not sent on with the machine."""


class Owner(Protocol):
    """What the loader needs of the incoming migration.

    stream_capabilities   see IncomingContext; the loader sets it
    """

    stream_capabilities: frozenset[str]

    def open_return_path(self) -> ReturnPathWriter: ...

    def begins(self) -> None:
        """A section comes, and not a command. Called before each."""

    def source_is_migfw(self) -> None:
        """The source said so."""

    def source_may_pause(self, allowed: bool) -> None:
        """Whether the source may be silent for long from here on."""


class Readable(Protocol):
    """What the loader needs of the channel."""

    def wait_readable(self, seconds: float) -> bool: ...


class StreamLoader:
    """Loads one stream. `load()` returns when the guest is complete."""

    def __init__(
        self,
        reader: StreamReader,
        channel: Readable,
        machine: Machine,
        loaders: LoaderRegistry,
        settings: Settings,
        owner: Owner,
    ) -> None:
        self._reader = reader
        self._channel = channel
        self._machine = machine
        self._loaders = loaders
        self._settings = settings
        self._owner = owner
        self._configuration: Configuration | None = None
        self._footers: bool | None = (
            None if isinstance(machine, AdoptsStreams) else settings.property("send-section-footer")
        )
        self._opened: dict[int, tuple[SectionHeader, LiveLoader]] = {}
        self._loaded: set[SectionKey] = set()
        self._ids: dict[SectionKey, int] = {}
        self._return_path: ReturnPathWriter | None = None
        self._passes_began = False
        self._switchover_started = False
        self._switchover_ack = SwitchoverAck(
            enabled=settings.capability("switchover-ack"), parks=isinstance(machine, AdoptsStreams)
        )
        self._kinds: dict[SectionType, Callable[[], None]] = {
            SectionType.START: self._load_start,
            SectionType.PART: lambda: self._load_part(ends=False),
            SectionType.END: lambda: self._load_part(ends=True),
            SectionType.FULL: self._load_full,
            SectionType.COMMAND: self._load_command,
        }
        self._commands: dict[Command, Callable[[bytes], None]] = {
            Command.OPEN_RETURN_PATH: self._open_return_path,
            Command.PING: self._ping,
            Command.SWITCHOVER_START: self._note_switchover,
        }

    def load(self) -> None:
        """Raises StreamError, ChannelError, MachineError."""
        try:
            self._load()
        except RemoteStreamError as error:
            if self._passes_began or not self._reader.ended:
                raise
            got = f"{error.got} (a source whose capability 'multifd' is on fails here: switch it off there)"
            raise RemoteStreamError(error.offset, error.where, error.expected, got) from None

    def _load(self) -> None:
        reader = self._reader
        reader.where = "header"
        read_header(reader)
        refusal = self._load_configuration()
        if refusal is not None:
            self._hear_who_it_is()
            raise refusal
        while True:
            self._allow_pause()
            if self._adopted():
                return
            reader.where = "stream"
            at = reader.offset
            kind = reader.u8("a section's type")
            self._owner.source_may_pause(False)
            if kind != SectionType.COMMAND:
                self._owner.begins()
            if kind == SectionType.EOF:
                break
            load = self._kinds.get(SectionType(kind)) if kind in SectionType._value2member_map_ else None
            if load is None:
                raise RemoteStreamError(at, "stream", "a section or a command", f"the type byte 0x{kind:02x}")
            load()
        self._check_complete("the end of the stream")
        self._read_description()

    # -- the frame -------------------------------------------------------------------------------------------------

    def _load_configuration(self) -> RemoteStreamError | None:
        """Read the configuration section; an error where it is whole, but of a machine that cannot be loaded here."""
        reader = self._reader
        reader.where = "configuration"
        if reader.peek(1) != bytes((SectionType.CONFIGURATION,)):
            if self._settings.property("send-configuration") and not isinstance(self._machine, AdoptsStreams):
                raise reader.error(
                    "a configuration section",
                    "none (set send-configuration the same on both sides)",
                )
            return None
        reader.u8("the section's type")
        at = reader.offset
        self._configuration = read_configuration_body(reader)
        name = self._configuration.name
        if not isinstance(self._machine, AdoptsStreams) and name != self._machine.name:
            return RemoteStreamError(at, "configuration", f"a machine '{self._machine.name}'", f"'{name}'")
        page_size = configuration_page_size(self._configuration)
        if page_size not in (None, TARGET_PAGE_SIZE):
            return RemoteStreamError(
                at, "configuration", f"target pages of {TARGET_PAGE_SIZE} bytes", f"{page_size} bytes"
            )
        self._owner.stream_capabilities = configuration_capabilities(self._configuration)
        if moved := UNREADABLE & self._owner.stream_capabilities:
            return RemoteStreamError(
                at,
                "configuration",
                "all pages in the stream",
                f"capability '{min(moved)}', which puts them elsewhere (switch it off on the source)",
            )
        return None

    def _hear_who_it_is(self) -> None:
        """Run the commands that come before the first section: among them a migfw says that it reads reasons."""
        with suppress(MigfwError):
            while self._reader.u8("a section's type") == SectionType.COMMAND:
                self._load_command()

    def _load_start(self) -> None:
        header = read_section_header(self._reader, SectionType.START)
        if header.section_id in self._opened:
            raise self._reader.error("a section id that is not in use", f"{header.section_id} again")
        loader = self._loader(header)
        if not isinstance(loader, LiveLoader):
            raise self._reader.error(f"section {loader.key} as FULL", "START")
        self._opened[header.section_id] = header, loader
        self._ids[loader.key] = header.section_id
        self._load_body(header, loader)

    def _load_part(self, *, ends: bool) -> None:
        section_id = read_part_header(self._reader)
        if section_id not in self._opened:
            raise self._reader.error("the id of a section that was started", str(section_id))
        header, loader = self._opened[section_id]
        self._passes_began = True
        self._load_body(header, loader)
        if not ends:
            self._switchover_ack.part_loaded()
        else:
            del self._opened[section_id]
            self._loaded.add(loader.key)

    def _load_full(self) -> None:
        header = read_section_header(self._reader, SectionType.FULL)
        loader = self._loader(header)
        self._load_body(header, loader)
        self._loaded.add(loader.key)

    def _loader(self, header: SectionHeader) -> SectionLoader:
        """The loader of a START or FULL; checks that it may come now, and its version."""
        key = SectionKey(header.idstr, header.instance_id)
        loader = self._loaders.find(key)
        known = ", ".join(str(one.key) for one in self._loaders)
        if loader is None:
            raise self._reader.error(f"one of the sections {known}", f"section {key}{self._explain_unknown(header)}")
        if key in self._loaded or any(one is loader for _, one in self._opened.values()):
            raise self._reader.error(f"section {key} once", "it again")
        if not loader.minimum_version <= header.version_id <= loader.version_id:
            raise self._reader.error(
                f"section {key} of a version from {loader.minimum_version} to {loader.version_id}",
                f"version {header.version_id}",
            )
        return loader

    def _explain_unknown(self, header: SectionHeader) -> str:
        if header.idstr in _SECTION_CAPABILITIES:
            return f", which {_belongs_to(_SECTION_CAPABILITIES[header.idstr])}"
        if isinstance(self._machine, AdoptsStreams) and header.type is SectionType.FULL and not self._loaded:
            return (
                ", a device that QEMU sends before the RAM, which cannot be parked"
                " (virtio-mem: give the device x-early-migration=off)"
            )
        return ""

    def _load_body(self, header: SectionHeader, loader: SectionLoader) -> None:
        reader = self._reader
        reader.where = f"section {loader.key}"
        loader.load(reader, header.version_id)
        self._allow_pause()  # a source may hold the footer back with what comes next
        if self._footers is None:
            self._footers = reader.peek(1) == bytes((SectionType.FOOTER,))
        if self._footers:
            read_footer(reader, header.section_id, f"section {loader.key}")

    def _allow_pause(self) -> None:
        """Once a live section has begun, a source may be silent between two sections: it waits for its bandwidth, for
        migrate-continue, for its guest to stop."""
        if self._ids:
            self._owner.source_may_pause(True)

    def _check_complete(self, came: str) -> None:
        if self._opened:
            header, _ = next(iter(self._opened.values()))
            raise self._reader.error(f"the END of {header}", came)
        for loader in self._loaders:
            if loader.required() and loader.key not in self._loaded:
                raise self._reader.error(f"section {loader.key}", came)
        missing = not_loaded(self._machine, self._loaders, lambda loader: loader.key in self._loaded)
        if missing is not None:
            raise self._reader.error(missing, f"{came}; no section that came carries it")

    def _read_description(self) -> None:
        """Nobody needs it, but it belongs to the stream: a cut one means that the stream was cut."""
        reader = self._reader
        reader.where = "description"
        start, end = reader.span()
        if start == end and self._return_path is not None:
            wait = DESCRIPTION_WAIT if self._settings.property("send-vmdescription") else 0
            if not self._channel.wait_readable(wait):
                return
        if reader.peek(1) == bytes((SectionType.VMDESCRIPTION,)):
            reader.u8("the section's type")
            read_description_body(reader)
        elif reader.peek(1):
            raise reader.error("the description or the end of the stream", f"0x{reader.peek(1)[0]:02x}")

    # -- what nobody here can decode -------------------------------------------------------------------------------

    def _adopted(self) -> bool:
        """Give the rest of the stream to a machine that keeps what nobody knows, when such a section comes next."""
        if not isinstance(self._machine, AdoptsStreams) or not (self._opened or self._loaded):
            return False
        name = self._peek_name()
        if name is None or self._loaders.find(name) is not None:
            return False
        if not self._passes_began and not self._loaded:
            return False  # a device that goes before the RAM; it is refused
        self._end_open_sections()
        self._check_complete(f"section {name}")
        configuration = self._configuration or Configuration("", b"")
        form = StreamFormat(
            configuration=self._configuration is not None,
            footers=bool(self._footers),
            configuration_tail=without_capabilities(configuration, ONCE).tail,
            section_ids=self._ids,
            switchover_start=self._switchover_started,
        )
        self._owner.begins()
        self._machine.adopt_sections(configuration.name, form, self._reader, self._live)
        return True

    def _end_open_sections(self) -> None:
        """The first device comes: live sections have ended, with an END or, in a background snapshot, without (QEMU 6.0
        and later, bg_migration_thread)."""
        self._loaded |= {loader.key for _, loader in self._opened.values()}
        self._opened.clear()

    def _live(self, seconds: float) -> bool:
        """See AdoptsStreams. A source that gets no answer ends its stream, so there is no need to guess from silence:
        the next read blocks until there is more, or the end."""
        return self._return_path is None or self._channel.wait_readable(seconds)

    def _peek_name(self) -> SectionKey | None:
        """The key of the FULL or START section that comes next; None when something else does."""
        reader = self._reader
        kind = reader.peek(1)
        if not kind or kind[0] not in (SectionType.START, SectionType.FULL):
            return None
        head = reader.peek(6)
        if len(head) < 6:
            return None
        whole = reader.peek(6 + head[5] + 4)
        name = whole[6 : 6 + head[5]].decode(errors="replace")
        return SectionKey(name, int.from_bytes(whole[6 + head[5] :], "big"))

    # -- commands --------------------------------------------------------------------------------------------------

    def _load_command(self) -> None:
        self._reader.where = "command"
        record = read_command(self._reader)
        run = self._commands.get(record.command)
        if run is None:
            raise self._reader.error(
                "a command of precopy", f"{record.command.name}, which {_belongs_to(_capability_of(record))}"
            )
        try:
            run(record.payload)
        except MigfwError as error:
            raise self._reader.error(f"{record.command.name} to succeed", str(error)) from error

    def _open_return_path(self, _payload: bytes) -> None:
        if self._return_path is not None:
            raise self._reader.error("OPEN_RETURN_PATH once", "it again")
        self._return_path = self._owner.open_return_path()
        name = self._configuration.name if self._configuration is not None else ""
        self._switchover_ack.return_path_opened(self._return_path, name)

    def _note_switchover(self, _payload: bytes) -> None:
        """QEMU announces the END sections with it, for devices that load their state in threads; nothing here does."""
        if self._switchover_started:
            raise self._reader.error("SWITCHOVER_START once", "it again")
        if not self._opened:
            raise self._reader.error("SWITCHOVER_START before the END of the live sections", "it after them")
        self._switchover_started = True

    def _ping(self, payload: bytes) -> None:
        if self._return_path is None:
            raise self._reader.error("OPEN_RETURN_PATH before PING", "PING")
        number = parse_ping(payload)
        if number == MIGFW_PING:
            self._owner.source_is_migfw()
        self._return_path.pong(number)


_COMMAND_CAPABILITIES: Final = {Command.ENABLE_COLO: "x-colo"}
"""Command -> the capability of the source that makes it send the command, where that is not postcopy-ram."""

_SECTION_CAPABILITIES: Final = {"block": "block", "dirty-bitmap": "dirty-bitmaps"}


def _capability_of(record: CommandRecord) -> str:
    if record.command is Command.POSTCOPY_ADVISE and parse_postcopy_advise(record.payload) is None:
        return "dirty-bitmaps"
    return _COMMAND_CAPABILITIES.get(record.command, "postcopy-ram")


def _belongs_to(capability: str) -> str:
    return f"belongs to the source's capability '{capability}' (switch it off there: no installed plugin supports it)"
