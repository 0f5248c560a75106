"""What a stream is made of, in order: the items that the decoder gives and that `encode` writes again.

Invariant: an item holds everything of its bytes, so writing all items again gives the stream byte for byte. `offset` is
where its first byte stands in the stream (in the package, for items inside PACKAGED); how long it is, its neighbour's
offset says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from corefw.errors import StreamError
from corefw.wire.constants import SectionType
from corefw.wire.description import Description, DeviceDescription
from corefw.wire.records import (
    CommandRecord,
    Configuration,
    RamRecord,
    SectionHeader,
    write_command,
    write_configuration,
    write_description,
    write_footer,
    write_header,
    write_layout,
    write_part_header,
    write_ram_record,
    write_section_header,
)
from corefw.wire.stream import StreamWriter


@dataclass(frozen=True, slots=True)
class Item:
    offset: int


@dataclass(frozen=True, slots=True)
class Header(Item):
    """Magic and version."""


@dataclass(frozen=True, slots=True)
class ConfigurationItem(Item):
    configuration: Configuration


@dataclass(frozen=True, slots=True)
class Section(Item):
    """The head of a START or FULL section."""

    header: SectionHeader


@dataclass(frozen=True, slots=True)
class Part(Item):
    """The head of a PART or END section; `header` is what its START said."""

    type: SectionType
    header: SectionHeader


@dataclass(frozen=True, slots=True)
class Ram(Item):
    """One record of a ram section's body. `block` is the block it is about, also where the record does not name it."""

    record: RamRecord
    block: str | None


@dataclass(frozen=True, slots=True)
class Layout(Item):
    """What a python guest's program consists of: the body of START of the section 'program-layout'."""

    text: bytes


@dataclass(frozen=True, slots=True)
class Body(Item):
    """The body of a device section, with its shape where the description tells it."""

    header: SectionHeader
    data: bytes
    device: DeviceDescription | None


@dataclass(frozen=True, slots=True)
class Footer(Item):
    section_id: int


@dataclass(frozen=True, slots=True)
class CommandItem(Item):
    record: CommandRecord


@dataclass(frozen=True, slots=True)
class Package(Item):
    """The stream within the stream that follows a PACKAGED command. `error` is what was wrong with it."""

    data: bytes
    items: tuple[Item, ...]
    error: StreamError | None


@dataclass(frozen=True, slots=True)
class Eof(Item):
    """The byte that ends the sections."""


@dataclass(frozen=True, slots=True)
class DescriptionItem(Item):
    """The description: its text as it came, and parsed (None: it is not what a description has to be)."""

    text: bytes
    description: Description | None


@dataclass(frozen=True, slots=True)
class Uncut(Item):
    """Bytes from a section head on that nothing here can tell apart: no description, no footers."""

    data: bytes


_WRITERS: Final[Mapping[type[Item], Callable[[StreamWriter, Any], None]]] = {
    Header: lambda writer, _: write_header(writer),
    ConfigurationItem: lambda writer, item: write_configuration(writer, item.configuration),
    Section: lambda writer, item: write_section_header(writer, item.header),
    Part: lambda writer, item: write_part_header(writer, item.type, item.header.section_id),
    Ram: lambda writer, item: write_ram_record(writer, item.record),
    Layout: lambda writer, item: write_layout(writer, item.text),
    Body: lambda writer, item: writer.write(item.data),
    Footer: lambda writer, item: write_footer(writer, item.section_id),
    CommandItem: lambda writer, item: write_command(writer, item.record.command, item.record.payload),
    Package: lambda writer, item: writer.write(item.data),
    Eof: lambda writer, _: writer.u8(SectionType.EOF),
    DescriptionItem: lambda writer, item: write_description(writer, item.text),
    Uncut: lambda writer, item: writer.write(item.data),
}


def encode(writer: StreamWriter, items: Iterable[Item]) -> None:
    """Write the items' bytes again."""
    for item in items:
        _WRITERS[type(item)](writer, item)
    writer.flush()
