"""How a stream goes on behind its live sections. The tail is chosen once per migration, by what the machine is.

    DeviceTail   the machine's devices have savers and loaders: FULL sections, EOF, a description
    StoredTail   a parked machine keeps the devices of another emulator as they were sent, up to the stream's last byte

Everything that the engine does differently for the two is in these classes.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

from corefw.engine.framing import SectionWriter
from corefw.engine.progress import LoadProgress
from corefw.engine.switchover import AckPolicy
from corefw.errors import RemoteStreamError, StreamError
from corefw.machine import Machine, ParkingMachine, RunState, StreamFormat, WaitReadable
from corefw.registry import LoaderRegistry, SaverRegistry
from corefw.section import SectionKey
from corefw.settings import Settings
from corefw.wire.constants import TARGET_PAGE_SIZE, Command, SectionType
from corefw.wire.frames import FrameReader
from corefw.wire.records import (
    COMMAND_HEADER,
    MAPPED_RAM,
    Configuration,
    PostcopyAdvice,
    SectionHeader,
    without_capabilities,
    write_description,
)
from corefw.wire.stream import MemorySink, StreamReader, StreamWriter
from corefw.wire.versions import SWITCHOVER_ACK, UNASKED_ACK, machine_version

_RUN: Final = COMMAND_HEADER.pack(SectionType.COMMAND, Command.POSTCOPY_RUN, 0)
_PING: Final = COMMAND_HEADER.pack(SectionType.COMMAND, Command.PING, 4)
_PING_SIZE: Final = len(_PING) + 4

ONE_FILE_ONLY: Final = frozenset({MAPPED_RAM})
"""Capabilities that describe how a stream lies in its file: a machine that is sent on does not name them again."""


def tail_of(machine: Machine) -> StreamTail:
    """The tail of every migration of this machine, either way."""
    return StoredTail(machine) if isinstance(machine, ParkingMachine) else DeviceTail(machine)


class StreamTail(ABC):
    """What either side of a migration does depending on the tail.

    advice   what a user can do with a guest that may be running on the destination
    """

    advice: str

    # -- either side -----------------------------------------------------------------------------------------------

    @abstractmethod
    def savers(self, savers: SaverRegistry) -> SaverRegistry:
        """Those of all savers that take part in the migration."""

    @abstractmethod
    def loaders(self, loaders: LoaderRegistry) -> LoaderRegistry:
        """Those of all loaders that take part in the migration."""

    # -- the source ------------------------------------------------------------------------------------------------

    @abstractmethod
    def may_leave_twice(self) -> bool:
        """Whether the guest may be sent again although it may be running elsewhere."""

    @abstractmethod
    def obstacle_to_checking(self) -> str | None:
        """Why a destination cannot be asked whether it would take the machine; None if it can."""

    @abstractmethod
    def stream_format(self, settings: Settings) -> StreamFormat:
        """How the stream is framed."""

    @abstractmethod
    def stored(self) -> Sequence[bytes]:
        """Device sections as they came, to follow those that savers write."""

    @abstractmethod
    def closing(self, sections: SectionWriter, settings: Settings) -> bytes:
        """The end of the stream, behind all sections. Once its first byte has been sent the destination may run the
        guest, so all of it is made before: plugins may raise here."""

    # -- the destination -------------------------------------------------------------------------------------------

    @abstractmethod
    def footers(self, settings: Settings) -> bool | None:
        """Whether sections have to end with footers; None: either all do or none."""

    @abstractmethod
    def check_configuration(self, configuration: Configuration | None, settings: Settings, at: int) -> None:
        """Raise RemoteStreamError if the stream is another machine's. `at` is the offset behind the header."""

    @abstractmethod
    def check_pages(self, advice: PostcopyAdvice) -> None:
        """Raise StreamError if pages of such sizes cannot be taken in postcopy."""

    @abstractmethod
    def ack_policy(self, configuration: Configuration | None, settings: Settings) -> AckPolicy:
        """When to send SWITCHOVER_ACK."""

    @abstractmethod
    def explain_unknown(self, header: SectionHeader, progress: LoadProgress) -> str:
        """What to add to the error about a section that no loader knows; "" for nothing."""

    @abstractmethod
    def load_rest(
        self, frames: FrameReader, progress: LoadProgress, check: Callable[[str], None], live: WaitReadable
    ) -> bool:
        """Take the rest of the stream if the tail begins here; whether it did. In a package, take the device sections:
        commands follow, so that is not the rest.

        `check(came)` raises RemoteStreamError if something is missing of what has to come before. `live` is that of
        ParkingMachine.adopt_sections().
        """

    @abstractmethod
    def run_state(self, sent: RunState) -> RunState:
        """The state to bring the machine into, for the one that the source's guest was in."""


class DeviceTail(StreamTail):
    """FULL sections that savers write and loaders read, EOF, a description."""

    advice = "'cont' starts it, if you know that the destination does not run it"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def savers(self, savers: SaverRegistry) -> SaverRegistry:
        return savers

    def loaders(self, loaders: LoaderRegistry) -> LoaderRegistry:
        return loaders

    def may_leave_twice(self) -> bool:
        return False

    def obstacle_to_checking(self) -> str | None:
        return None

    def stream_format(self, settings: Settings) -> StreamFormat:
        return _format_by_settings(settings)

    def stored(self) -> Sequence[bytes]:
        return ()

    def closing(self, sections: SectionWriter, settings: Settings) -> bytes:
        return _end_of(sections, settings)

    def footers(self, settings: Settings) -> bool | None:
        return settings.property("send-section-footer")

    def check_configuration(self, configuration: Configuration | None, settings: Settings, at: int) -> None:
        if configuration is None:
            if settings.property("send-configuration"):
                hint = "none (set send-configuration the same on both sides)"
                raise RemoteStreamError(at, "configuration", "a configuration section", hint)
        elif configuration.name != self._machine.name:
            expected = f"a machine '{self._machine.name}'"
            raise RemoteStreamError(at, "configuration", expected, f"'{configuration.name}'")

    def check_pages(self, advice: PostcopyAdvice) -> None:
        """Pages are installed in the size in which they come."""
        if advice != PostcopyAdvice(mmap.PAGESIZE, TARGET_PAGE_SIZE):
            raise StreamError(f"expected pages of {TARGET_PAGE_SIZE} bytes on both hosts, got {advice}")

    def ack_policy(self, configuration: Configuration | None, settings: Settings) -> AckPolicy:
        """No device here has a say in it, and the source is a migfw, which knows the message."""
        del configuration
        return AckPolicy.AT_ONCE if settings.capability("switchover-ack") else AckPolicy.NEVER

    def explain_unknown(self, header: SectionHeader, progress: LoadProgress) -> str:
        del header, progress
        return ""

    def load_rest(
        self, frames: FrameReader, progress: LoadProgress, check: Callable[[str], None], live: WaitReadable
    ) -> bool:
        del frames, progress, check, live
        return False

    def run_state(self, sent: RunState) -> RunState:
        return sent


class StoredTail(StreamTail):
    """Bytes from the first device section on, which a parked machine keeps and sends on as they are."""

    advice = "parked, it cannot run: migrate it again, if you know that the destination does not run it"

    def __init__(self, machine: ParkingMachine) -> None:
        self._machine = machine

    def savers(self, savers: SaverRegistry) -> SaverRegistry:
        """The live ones: all other sections are among the bytes that are kept."""
        return SaverRegistry(savers.live())

    def loaders(self, loaders: LoaderRegistry) -> LoaderRegistry:
        """As for savers()."""
        return LoaderRegistry(loaders.live())

    def may_leave_twice(self) -> bool:
        """It is only stored and sent on, which runs nothing."""
        return True

    def obstacle_to_checking(self) -> str | None:
        return "a waiting QEMU would exit when a peer connects and disconnects; only this side was checked"

    def stream_format(self, settings: Settings) -> StreamFormat:
        return self._machine.stored_format() or _format_by_settings(settings)

    def stored(self) -> Sequence[bytes]:
        return self._machine.stored_sections()

    def closing(self, sections: SectionWriter, settings: Settings) -> bytes:
        """As it came; the stream of a postcopy has none that could be kept."""
        return self._machine.stored_end() or _end_of(sections, settings)

    def footers(self, settings: Settings) -> bool | None:
        del settings
        return None

    def check_configuration(self, configuration: Configuration | None, settings: Settings, at: int) -> None:
        """Any machine can be parked, with or without a configuration section."""

    def check_pages(self, advice: PostcopyAdvice) -> None:
        """Nothing here waits for a page, so the source may have huge pages."""
        if advice.target_page_size != TARGET_PAGE_SIZE:
            expected = f"target pages of {TARGET_PAGE_SIZE} bytes"
            raise StreamError(f"expected {expected}, got {advice.target_page_size} bytes")

    def ack_policy(self, configuration: Configuration | None, settings: Settings) -> AckPolicy:
        """The source is a QEMU, and its machine type says whether it understands the message."""
        version = machine_version(configuration.name if configuration is not None else "")
        if version is None:
            return AckPolicy.IF_AWAITED
        if not UNASKED_ACK.holds(version):
            return AckPolicy.NEVER
        understood = settings.capability("switchover-ack") or SWITCHOVER_ACK.holds(version)
        return AckPolicy.AT_ONCE if understood else AckPolicy.IF_AWAITED

    def explain_unknown(self, header: SectionHeader, progress: LoadProgress) -> str:
        if header.type is not SectionType.FULL or progress.loaded:
            return ""
        return (
            ", a device that QEMU sends before the RAM, which cannot be parked"
            " (virtio-mem: give the device x-early-migration=off)"
        )

    def load_rest(
        self, frames: FrameReader, progress: LoadProgress, check: Callable[[str], None], live: WaitReadable
    ) -> bool:
        """The tail begins with the first section that no loader knows, once passes have been loaded. A device that goes
        before the RAM is not part of it, and is refused."""
        if self._machine.stored_format() is not None:
            return False
        if not (progress.passes_began or progress.loaded or frames.is_package):
            return False
        name = frames.peek_section()
        if name is None or progress.is_known(key := SectionKey(*name)):
            return False
        configuration = progress.configuration or Configuration("", b"")
        if frames.is_package:
            self._machine.adopt_package(configuration.name, _format_of(frames, progress), _packaged(frames.reader))
            return False
        progress.end_live_sections()
        check(f"section {key}")
        self._machine.adopt_sections(configuration.name, _format_of(frames, progress), frames.reader, live)
        return True

    def run_state(self, sent: RunState) -> RunState:
        del sent
        return RunState.PAUSED


def _format_of(frames: FrameReader, progress: LoadProgress) -> StreamFormat:
    """How the stream is framed that is being loaded."""
    configuration = progress.configuration or Configuration("", b"")
    return StreamFormat(
        configuration=progress.configuration is not None,
        footers=bool(frames.footers),
        configuration_tail=without_capabilities(configuration, ONE_FILE_ONLY).tail,
        section_ids=progress.live_ids,
        switchover_start=progress.switchover_started,
    )


def _packaged(reader: StreamReader) -> bytes:
    """The device sections of a package, read up to the commands behind them: RUN, and in front of it PINGs: one if the
    RAM follows, two since QEMU 10.2 (postcopy_start)."""
    sections = bytearray()
    while not reader.at_end():
        start, end = reader.span()
        sections += reader.buffer[start:end]
        reader.skip(end - start)
    end = len(sections) - (len(_RUN) if sections.endswith(_RUN) else 0)
    while sections.startswith(_PING, end - _PING_SIZE, end):
        end -= _PING_SIZE
    reader.unread(sections[end:])
    return bytes(sections[:end])


def _end_of(sections: SectionWriter, settings: Settings) -> bytes:
    """The EOF byte, and a description of what savers have written."""
    made = MemorySink()
    writer = StreamWriter(made)
    writer.u8(SectionType.EOF)
    if settings.property("send-vmdescription"):
        write_description(writer, sections.description())
    writer.flush()
    return bytes(made.data)


def _format_by_settings(settings: Settings) -> StreamFormat:
    return StreamFormat(
        configuration=settings.property("send-configuration"),
        footers=settings.property("send-section-footer"),
        configuration_tail=b"",
        section_ids={},
    )
