"""The reader of a stream's frame: everything around the bodies of sections.

`FrameReader.next_event()` returns one event after another; the caller reads bodies and packages in between:

    Header  ConfigurationItem?
    ( Section  body  Footer? | Part  body  Footer? | CommandItem  package? )*
    Eof  DescriptionItem?  None

Invariant: every event was checked as far as the frame goes (magic, versions, lengths, ids that were started, footers),
so the loader, `inspect`, `convert` and a parked machine agree on what a well-formed stream is. Anything else raises
RemoteStreamError with offset, expected and got.

Source: QEMU 7.2 and 10.0, qemu_loadvm_state_main and what it calls (migration/savevm.c); docs/stream.md describes the
format. Threads: one at a time for each reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Self

from corefw.errors import RemoteStreamError
from corefw.wire.constants import Command, SectionType
from corefw.wire.records import (
    CommandRecord,
    Configuration,
    SectionHeader,
    peek_section_header,
    read_command,
    read_configuration_body,
    read_description_body,
    read_footer,
    read_header,
    read_part_header,
    read_section_header,
)
from corefw.wire.stream import StreamReader


@dataclass(frozen=True, slots=True)
class Item:
    """Something in a stream. `offset` is that of its first byte (in its package, for items inside PACKAGED)."""

    offset: int


@dataclass(frozen=True, slots=True)
class Header(Item):
    """Magic and version."""


@dataclass(frozen=True, slots=True)
class ConfigurationItem(Item):
    """The configuration section."""

    configuration: Configuration


@dataclass(frozen=True, slots=True)
class Section(Item):
    """The head of a START or FULL section. Its body follows."""

    header: SectionHeader


@dataclass(frozen=True, slots=True)
class Part(Item):
    """The head of a PART or END section; `header` is that of its START. Its body follows."""

    type: SectionType
    header: SectionHeader


@dataclass(frozen=True, slots=True)
class Footer(Item):
    """The end of a section, which repeats the section's id."""

    section_id: int


@dataclass(frozen=True, slots=True)
class CommandItem(Item):
    """A command. The package of PACKAGED follows (corefw.wire.records.read_package)."""

    record: CommandRecord


@dataclass(frozen=True, slots=True)
class Eof(Item):
    """The byte that ends the sections."""


@dataclass(frozen=True, slots=True)
class DescriptionItem(Item):
    """The description of the device sections: JSON text as it came (see corefw.wire.description)."""

    text: bytes


class _Place(Enum):
    """The kind of thing that comes next."""

    HEADER = auto()
    CONFIGURATION = auto()
    SECTIONS = auto()
    BODY = auto()  # of a section; the caller reads it, so when next_event() is called the footer comes
    DESCRIPTION = auto()
    END = auto()


@dataclass(slots=True)
class _Framing:
    """Facts from the frame so far; a stream shares them with the packages in it.

    footers   whether sections end with one; None while no section has ended
    opened    the live sections that were started and have not ended, by id
    ended     those that have ended
    packaged  a package has come. From then on a section may end again: in a postcopy of dirty bitmaps alone, QEMU ends
              the section 'ram' once before it and once behind it (qemu_savevm_state_complete_postcopy, 11.1)
    """

    footers: bool | None
    opened: dict[int, SectionHeader] = field(default_factory=dict)
    ended: dict[int, SectionHeader] = field(default_factory=dict)
    packaged: bool = False


class FrameReader:
    """Reads the frame of one stream, or of one package.

    reader       where the bytes come from; between two events the caller reads bodies from it
    is_package   it is the stream within a stream
    """

    def __init__(self, reader: StreamReader, *, footers: bool | None = None) -> None:
        """A stream from its first byte on. `footers`: whether its sections have to end with footers; None: they all do
        if the first one does."""
        self.reader: Final = reader
        self._framing = _Framing(footers)
        self._place = _Place.HEADER
        self.is_package = False
        self._section_id = 0

    @classmethod
    def of_sections(cls, reader: StreamReader, *, footers: bool | None = None) -> Self:
        """A stream without header and configuration: sections up to EOF, and the description."""
        frames = cls(reader, footers=footers)
        frames._place = _Place.SECTIONS
        return frames

    def going_on_with(self, reader: StreamReader) -> Self:
        """Continue this stream with another reader."""
        frames = type(self).of_sections(reader)
        frames._framing = self._framing
        frames.is_package = self.is_package
        return frames

    def resumed(self, reader: StreamReader, opened: Iterable[SectionHeader]) -> Self:
        """Continue this stream over another connection, from the next section on; these live sections continue in it,
        even if their END had begun to arrive."""
        frames = self.going_on_with(reader)
        frames._framing.opened.update((header.section_id, header) for header in opened)
        return frames

    def inside(self, package: StreamReader) -> Self:
        """The stream within this stream that a PACKAGED command brought. It may end without EOF, and has no packages.

        It knows the live sections of this stream, which goes on behind the package, and can be read by another thread
        meanwhile.
        """
        frames = self.going_on_with(package)
        frames.is_package = True
        return frames

    @property
    def footers(self) -> bool | None:
        """Whether sections end with footers; None while that is not known."""
        return self._framing.footers

    def peek_section(self) -> tuple[str, int] | None:
        """Name and instance of the START or FULL section that comes next, without consuming anything; None if something
        else comes. Blocks like peek_type()."""
        if self._place is _Place.BODY and self._has_footer():
            return None
        return peek_section_header(self.reader) if self.peek_type() in (SectionType.START, SectionType.FULL) else None

    def peek_type(self) -> int | None:
        """The type byte that comes next (see SectionType), without consuming it; None at the end of the stream. Blocks
        until that is known. Do not call it before a body."""
        ahead = self.reader.peek(1)
        return ahead[0] if ahead else None

    def next_event(self) -> Item | None:
        """The next part of the frame, or None after the last one; blocks until it arrives.

        After a Section or Part the caller has to read the whole body before it asks for the next event, after PACKAGED
        the whole package. Raises RemoteStreamError, ChannelError.
        """
        return _READERS[self._place](self)

    # -- the beginning ---------------------------------------------------------------------------------------------

    def _read_header(self) -> Item:
        self.reader.where = "header"
        at = self.reader.offset
        read_header(self.reader)
        self._place = _Place.CONFIGURATION
        return Header(at)

    def _read_configuration(self) -> Item | None:
        reader = self.reader
        reader.where = "configuration"
        self._place = _Place.SECTIONS
        if self.peek_type() != SectionType.CONFIGURATION:
            return self._read_frame()
        at = reader.offset
        reader.u8("the section's type")
        return ConfigurationItem(at, read_configuration_body(reader))

    # -- sections and commands -------------------------------------------------------------------------------------

    def _read_frame(self) -> Item | None:
        reader = self.reader
        reader.where = "stream"
        at = reader.offset
        if self.is_package and reader.at_end():
            self._place = _Place.END
            return None
        kind = reader.u8("a section's type")
        read = _FRAMES.get(kind)
        if read is None:
            raise RemoteStreamError(at, "stream", "a section or a command", f"the type byte 0x{kind:02x}")
        return read(self, at, SectionType(kind))

    def _read_section(self, at: int, kind: SectionType) -> Item:
        header = read_section_header(self.reader, kind)
        if kind is SectionType.START:
            if header.section_id in self._framing.opened:
                raise self.reader.error("a section id that is not in use", f"{header.section_id} again")
            self._framing.opened[header.section_id] = header
        self._expect_body(header)
        return Section(at, header)

    def _read_part(self, at: int, kind: SectionType) -> Item:
        section_id = read_part_header(self.reader)
        framing = self._framing
        header = framing.opened.get(section_id)
        if header is None and kind is SectionType.END and framing.packaged:
            header = framing.ended.get(section_id)
        if header is None:
            raise RemoteStreamError(at, "stream", "the id of a section that was started", str(section_id))
        if kind is SectionType.END:
            framing.opened.pop(section_id, None)
            framing.ended[section_id] = header
        self._expect_body(header)
        return Part(at, kind, header)

    def _expect_body(self, header: SectionHeader) -> None:
        self.reader.where = f"section {header.section_id} '{header.idstr}'"
        self._section_id = header.section_id
        self._place = _Place.BODY

    def _read_footer(self) -> Item | None:
        """Where the body was that the caller has read; `reader.where` still says which."""
        reader = self.reader
        self._place = _Place.SECTIONS
        if not self._has_footer():
            return self._read_frame()
        at = reader.offset
        read_footer(reader, self._section_id, reader.where)
        return Footer(at, self._section_id)

    def _has_footer(self) -> bool:
        """Whether a footer has to come next; the first section of a stream decides where nothing else did."""
        framing = self._framing
        if framing.footers is None:
            framing.footers = self.peek_type() == SectionType.FOOTER
        return framing.footers

    def _read_command(self, at: int, _: SectionType) -> Item:
        self.reader.where = "command"
        record = read_command(self.reader)
        if record.command is Command.PACKAGED:
            if self.is_package:
                raise self.reader.error("no package within a package", f"command {record.name}")
            self._framing.packaged = True
        return CommandItem(at, record)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _read_eof(self, at: int, _: SectionType) -> Item:
        self._place = _Place.DESCRIPTION
        return Eof(at)

    def _read_description(self) -> Item | None:
        reader = self.reader
        reader.where = "description"
        self._place = _Place.END
        at, kind = reader.offset, self.peek_type()
        if kind is None:
            return None
        if kind != SectionType.VMDESCRIPTION:
            raise reader.error("the description or the end of the stream", f"0x{kind:02x}")
        reader.u8("the section's type")
        return DescriptionItem(at, read_description_body(reader))

    def _read_end(self) -> None:
        if (kind := self.peek_type()) is not None:
            raise self.reader.error("the end of the stream", f"more bytes, the first 0x{kind:02x}")


_READERS: Final[Mapping[_Place, Callable[[FrameReader], Item | None]]] = {
    _Place.HEADER: FrameReader._read_header,
    _Place.CONFIGURATION: FrameReader._read_configuration,
    _Place.SECTIONS: FrameReader._read_frame,
    _Place.BODY: FrameReader._read_footer,
    _Place.DESCRIPTION: FrameReader._read_description,
    _Place.END: FrameReader._read_end,
}

_FRAMES: Final[Mapping[int, Callable[[FrameReader, int, SectionType], Item]]] = {
    SectionType.START: FrameReader._read_section,
    SectionType.FULL: FrameReader._read_section,
    SectionType.PART: FrameReader._read_part,
    SectionType.END: FrameReader._read_part,
    SectionType.COMMAND: FrameReader._read_command,
    SectionType.EOF: FrameReader._read_eof,
}
"""Type byte -> the method that reads the rest of the frame after it."""
