"""The section 'dirty-bitmap': the dirty bitmaps of block nodes, as a sequence of records.

    START      a bitmap begins: its granularity, and whether it is enabled and persistent
    BITS       a piece of it; with ZEROES without data
    COMPLETE   all of it has come
    EOS        the body of the section ends (a flag of its last record, usually of one that has nothing else)

A name that is left out is that of the record before. docs/stream.md has the layout.

Source: QEMU 10.0, migration/block-dirty-bitmap.c; 5.2 to 11.1 write the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Final

from corefw.wire.stream import StreamReader, StreamWriter

BITMAPS_IDSTR: Final = "dirty-bitmap"
BITMAPS_VERSION: Final = 1
SECTOR: Final = 512
"""Bytes of a sector, the unit of BITS."""
MIN_GRANULARITY: Final = 512
MAX_GRANULARITY: Final = 1 << 31
CHUNK_BYTES: Final = 1024
"""Bytes of bits in a record that QEMU writes."""
MAX_CHUNK_BYTES: Final = 10 * CHUNK_BYTES
"""Maximum data in a record, as in QEMU."""
WORD: Final = 8
"""Bits travel in whole little-endian words of 64."""
CHUNK_ALIGNMENT: Final = 4 * WORD
"""QEMU pads the data of a record to a multiple of this."""
MAX_SECTORS: Final = (1 << 63) // SECTOR


class BitmapFlag(IntFlag):
    """The flags at the beginning of a record (DIRTY_BITMAP_MIG_FLAG_*)."""

    EOS = 0x01
    ZEROES = 0x02
    BITMAP_NAME = 0x04
    NODE_NAME = 0x08
    START = 0x10
    COMPLETE = 0x20
    BITS = 0x40


EXTENDED: Final = 0x80
"""In the first byte: the flags have a second one; in the second: they have four. No QEMU writes that."""
_ALL_FLAGS: Final = 0x7F
_KINDS: Final = (BitmapFlag.START, BitmapFlag.COMPLETE, BitmapFlag.BITS)


class StartFlag(IntFlag):
    """The flags of a START (DIRTY_BITMAP_MIG_START_FLAG_*). AUTOLOAD is ignored; QEMU before 2.13 sent it."""

    ENABLED = 0x01
    PERSISTENT = 0x02
    AUTOLOAD = 0x04


NO_START_FLAGS: Final = StartFlag(0)
_ALL_START_FLAGS: Final = 0x07


@dataclass(frozen=True, slots=True)
class BitmapRecord:
    """One record.

    flags         without EXTENDED; `width` is the number of bytes that they take (1, 2 or 4)
    node, bitmap  names; None if they are left out
    granularity   START: bytes per bit
    start_flags   START
    sector        BITS: the first sector; sectors: how many
    data          BITS without ZEROES: the bits as little-endian words, padded
    """

    flags: BitmapFlag
    node: str | None = None
    bitmap: str | None = None
    granularity: int = 0
    start_flags: StartFlag = NO_START_FLAGS
    sector: int = 0
    sectors: int = 0
    data: bytes | None = None
    width: int = 1

    @property
    def kind(self) -> BitmapFlag | None:
        """START, COMPLETE or BITS; None for a record that has only EOS."""
        return next((kind for kind in _KINDS if kind in self.flags), None)


def read_bitmap_record(reader: StreamReader) -> BitmapRecord:
    """Read a record. Raises RemoteStreamError for one that no QEMU writes."""
    flags, width = _read_flags(reader)
    node = reader.string("the name of a block node") if BitmapFlag.NODE_NAME in flags else None
    bitmap = reader.string("the name of a bitmap") if BitmapFlag.BITMAP_NAME in flags else None
    record = BitmapRecord(flags, node, bitmap, width=width)
    match record.kind:
        case BitmapFlag.START:
            return _read_start(reader, record)
        case BitmapFlag.BITS:
            return _read_bits(reader, record)
        case _:
            return record


def _read_flags(reader: StreamReader) -> tuple[BitmapFlag, int]:
    value, width = reader.u8("flags"), 1
    if value & EXTENDED:
        value, width = (value & ~EXTENDED) << 8 | reader.u8("flags"), 2
        if value & EXTENDED:
            value, width = (value & ~EXTENDED) << 16 | reader.be16("flags"), 4
    flags = BitmapFlag(value & _ALL_FLAGS)
    if value & ~_ALL_FLAGS:
        raise reader.error("known flags of a bitmap's record", f"{value:#x}")
    if sum(kind in flags for kind in _KINDS) > 1 or (BitmapFlag.ZEROES in flags and BitmapFlag.BITS not in flags):
        raise reader.error("one of START, COMPLETE and BITS", f"the flags {value:#x}")
    if not flags:
        raise reader.error("flags of a bitmap's record", "none")
    return flags, width


def _read_start(reader: StreamReader, record: BitmapRecord) -> BitmapRecord:
    granularity = reader.be32("a bitmap's granularity")
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        expected = f"a granularity of a power of two of at least {MIN_GRANULARITY} bytes"
        raise reader.error(expected, f"{granularity}")
    flags = reader.u8("a bitmap's flags")
    if flags & ~_ALL_START_FLAGS:
        raise reader.error("known flags of a bitmap", f"{flags:#x}")
    return replace(record, granularity=granularity, start_flags=StartFlag(flags))


def _read_bits(reader: StreamReader, record: BitmapRecord) -> BitmapRecord:
    sector, sectors = reader.be64("a first sector"), reader.be32("a number of sectors")
    if sector + sectors > MAX_SECTORS:
        raise reader.error(f"sectors below {MAX_SECTORS}", f"{sectors} from {sector} on")
    data = None
    if BitmapFlag.ZEROES not in record.flags:
        data = reader.read(reader.be64("the size of a bitmap's bits"), "a bitmap's bits", MAX_CHUNK_BYTES)
    return replace(record, sector=sector, sectors=sectors, data=data)


def write_bitmap_record(writer: StreamWriter, record: BitmapRecord) -> None:
    _write_flags(writer, record)
    if record.node is not None:
        writer.string(record.node)
    if record.bitmap is not None:
        writer.string(record.bitmap)
    if record.kind is BitmapFlag.START:
        writer.be32(record.granularity)
        writer.u8(record.start_flags)
    elif record.kind is BitmapFlag.BITS:
        writer.be64(record.sector)
        writer.be32(record.sectors)
        if record.data is not None:
            writer.be64(len(record.data))
            writer.write(record.data)


def _write_flags(writer: StreamWriter, record: BitmapRecord) -> None:
    match record.width:
        case 1:
            writer.u8(record.flags)
        case 2:
            writer.be16(EXTENDED << 8 | record.flags)
        case _:
            writer.be32(EXTENDED << 24 | EXTENDED << 16 | record.flags)


def chunk_sectors(granularity: int) -> int:
    """Sectors in a record of BITS that is not the last of its bitmap."""
    return CHUNK_BYTES * 8 * granularity // SECTOR


def bits_size(sectors: int, granularity: int) -> int:
    """Bytes of the whole words for the bits of this many sectors, from the beginning of a word on."""
    granules = -(-sectors * SECTOR // granularity)
    return -(-granules // (8 * WORD)) * WORD


def padded_size(size: int) -> int:
    """Bytes of data in a record whose bits take `size` bytes."""
    return -(-size // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
