"""The items of a stream: the events of its frame (frames.py), and the records in between.

The decoder gives these items in the order of the stream, and `encode` writes them again.
Invariant: an item holds everything that its bytes say, so writing all items gives the stream byte for byte. It ends
where the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from corefw.errors import StreamError
from corefw.wire.constants import SectionType
from corefw.wire.description import DeviceDescription
from corefw.wire.frames import (
    CommandItem,
    ConfigurationItem,
    DescriptionItem,
    Eof,
    Footer,
    Header,
    Item,
    Part,
    Section,
)
from corefw.wire.records import (
    BitmapRecord,
    RamRecord,
    SectionHeader,
    write_bitmap_record,
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
class Ram(Item):
    """One record of a ram section's body. `block` is its RAM block, named in the record or not."""

    record: RamRecord
    block: str | None


@dataclass(frozen=True, slots=True)
class Bitmap(Item):
    """One record of a dirty-bitmap section's body. `node` and `bitmap` are the names that it is about, written in it or
    in a record before; None for one that only ends the body."""

    record: BitmapRecord
    node: str | None
    bitmap: str | None


@dataclass(frozen=True, slots=True)
class Layout(Item):
    """The layout of a python guest's program: the body of START of the section 'program-layout'."""

    text: bytes


@dataclass(frozen=True, slots=True)
class Body(Item):
    """The body of a device section, with its shape if the description has it."""

    header: SectionHeader
    data: bytes
    device: DeviceDescription | None


@dataclass(frozen=True, slots=True)
class Package(Item):
    """The stream within the stream that follows a PACKAGED command. `error`: what is wrong with it, or None."""

    data: bytes
    items: tuple[Item, ...]
    error: StreamError | None


@dataclass(frozen=True, slots=True)
class Uncut(Item):
    """Sections that cannot be split, because there is neither a description nor footers."""

    data: bytes


_WRITERS: Final[Mapping[type[Item], Callable[[StreamWriter, Any], None]]] = {
    Header: lambda writer, _: write_header(writer),
    ConfigurationItem: lambda writer, item: write_configuration(writer, item.configuration),
    Section: lambda writer, item: write_section_header(writer, item.header),
    Part: lambda writer, item: write_part_header(writer, item.type, item.header.section_id),
    Ram: lambda writer, item: write_ram_record(writer, item.record),
    Bitmap: lambda writer, item: write_bitmap_record(writer, item.record),
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
    """The bytes of the items."""
    for item in items:
        _WRITERS[type(item)](writer, item)
    writer.flush()


__all__ = [
    "Bitmap",
    "Body",
    "CommandItem",
    "ConfigurationItem",
    "DescriptionItem",
    "Eof",
    "Footer",
    "Header",
    "Item",
    "Layout",
    "Package",
    "Part",
    "Ram",
    "Section",
    "Uncut",
    "encode",
]
