"""The data after each RAM block in the list if the capability mapped-ram is on.

That is a header, the bitmap of the pages that are in the file, and the pages, each at an offset of its own. All other
pages are zero.

Source: QEMU 9.0 and later, mapped_ram_setup_ramblock and parse_ramblock_mapped_ram (migration/ram.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

from corefw.wire.stream import StreamReader, StreamWriter

MAPPED_RAM: Final = "mapped-ram"
MAPPED_VERSION: Final = 1
MAX_BITMAP: Final = 64 << 20
"""Bytes of a block's bitmap: 2 TiB of RAM."""

_HEADER: Final = Struct(">IQQQ")
_WORD: Final = 8


@dataclass(frozen=True, slots=True)
class MappedHeader:
    """Sizes in bytes; both offsets count from the file's first byte."""

    page_size: int
    bitmap_offset: int
    pages_offset: int

    def bitmap_size(self, length: int) -> int:
        """Bytes of the bitmap of a block of `length` bytes: whole words of 64 pages."""
        return -(-length // self.page_size // (8 * _WORD)) * _WORD


def read_mapped_header(reader: StreamReader, page_size: int, length: int) -> MappedHeader:
    """The header of a block of `length` bytes."""
    raw = reader.read(_HEADER.size, "the header of a block's pages in the file")
    version, *fields = _HEADER.unpack(raw)
    header = MappedHeader(*fields)
    if version != MAPPED_VERSION:
        raise reader.error(f"version {MAPPED_VERSION} of mapped-ram", f"version {version}")
    if header.page_size != page_size:
        raise reader.error(f"pages of {page_size} bytes", f"{header.page_size}")
    if header.bitmap_size(length) > MAX_BITMAP:
        raise reader.error(f"a bitmap of at most {MAX_BITMAP} bytes", f"{header.bitmap_size(length)}")
    if header.pages_offset < header.bitmap_offset + header.bitmap_size(length):
        raise reader.error("pages behind their bitmap", f"both from {header.pages_offset:#x} on")
    return header


def write_mapped_header(writer: StreamWriter, header: MappedHeader) -> None:
    writer.write(_HEADER.pack(MAPPED_VERSION, header.page_size, header.bitmap_offset, header.pages_offset))


def read_bitmap(reader: StreamReader, header: MappedHeader, length: int) -> Iterator[bytes]:
    """The bitmap of a block of `length` bytes, in pieces. Page 0 is bit 0 of the first byte."""
    reader.pass_to(header.bitmap_offset, "the bitmap of a block's pages")
    left = header.bitmap_size(length)
    while left:
        piece = reader.read(min(left, 1 << 20), "the bitmap of a block's pages")
        left -= len(piece)
        yield piece
