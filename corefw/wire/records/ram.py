"""The records of the ram section: their headers, the list of blocks in MEM_SIZE, and the bodies of single pages.

Every reader of RAM parses headers with read_ram_header(). `inspect` reads one record at a time; the ram plugin also
stores runs of records of one kind without reading their headers one by one.

Source: QEMU 7.2's ram_save_setup and ram_load_precopy (migration/ram.c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from corefw.errors import StreamError
from corefw.wire.constants import TARGET_PAGE_SIZE, RamFlag
from corefw.wire.records.mapped import read_bitmap, read_mapped_header
from corefw.wire.stream import StreamReader, StreamWriter

MAX_BLOCKS: Final = 4096
"""RAM blocks that one stream may announce; QEMU machines have tens."""


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """A RAM block as MEM_SIZE announces it. `length` is the used length in bytes.

    page_size   the host's page size for this block; sent only with postcopy-ram, if it is not the usual one
    address     the guest address; sent only with x-ignore-shared
    mapped      pages that are in the file after the entry; None without mapped-ram
    """

    idstr: str
    length: int
    page_size: int | None = None
    address: int | None = None
    mapped: int | None = None


def read_block_list(
    reader: StreamReader, total: int, *, page_sizes: bool = False, addresses: bool = False
) -> Iterator[BlockEntry]:
    """Entries until their lengths add up to `total`, the rest of the MEM_SIZE word.

    `page_sizes`: POSTCOPY_ADVISE came, so an entry may carry one. `addresses`: x-ignore-shared is on, each carries one.
    Where mapped-ram is on, the caller reads what stands behind each entry before it asks for the next.
    """
    names: set[str] = set()
    left = total
    while left > 0:
        if len(names) == MAX_BLOCKS:
            raise reader.error(f"at most {MAX_BLOCKS} RAM blocks", "more")
        entry = _read_block_entry(reader, page_sizes, addresses)
        if entry.length > left:
            raise reader.error(
                f"RAM blocks of {total} bytes in all", f"'{entry.idstr}' with {entry.length} of the last {left}"
            )
        if entry.idstr in names:
            raise reader.error("each RAM block once", f"'{entry.idstr}' again")
        names.add(entry.idstr)
        left -= entry.length
        yield entry


def _read_block_entry(reader: StreamReader, page_sizes: bool, addresses: bool) -> BlockEntry:
    idstr = reader.string("the name of a RAM block")
    length = reader.be64(f"the length of RAM block '{idstr}'")
    page_size = None
    if page_sizes and _is_page_size(reader.peek(8)):
        page_size = reader.be64(f"the page size of RAM block '{idstr}'")
    address = reader.be64(f"the address of RAM block '{idstr}'") if addresses else None
    return BlockEntry(idstr, length, page_size, address)


def _is_page_size(ahead: bytes) -> bool:
    """Whether a page size comes next, and not a name (its length is no zero) or a RAM record (it has a flag)."""
    value = int.from_bytes(ahead, "big")
    return len(ahead) == 8 and ahead[0] == 0 and value >= 4096 and value & (value - 1) == 0


def write_block_list(writer: StreamWriter, entries: Sequence[BlockEntry]) -> None:
    for entry in entries:
        if entry.mapped is not None:
            raise StreamError(f"the pages of '{entry.idstr}' stay in their file: park the machine to write them again")
        writer.string(entry.idstr)
        writer.be64(entry.length)
        if entry.page_size is not None:
            writer.be64(entry.page_size)
        if entry.address is not None:
            writer.be64(entry.address)


# -- records of pages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RamRecord:
    """One record of a ram section.

    address   offset in the block; the sum of the blocks' lengths for MEM_SIZE; otherwise 0
    idstr     the block, if the record names one (without CONTINUE)
    body      what follows, byte for byte: a page, a fill byte, a compressed page with its length
    blocks    the list behind MEM_SIZE
    kind      the flags but for CONTINUE
    """

    flags: RamFlag
    address: int
    idstr: str | None = None
    body: bytes = b""
    blocks: tuple[BlockEntry, ...] = ()

    @property
    def kind(self) -> RamFlag:
        return _FLAGS[int(self.flags)][1]


@dataclass(frozen=True, slots=True)
class RamLayout:
    """Facts from earlier parts of the stream that decide the layout of its ram records."""

    page_size: int = TARGET_PAGE_SIZE
    page_sizes: bool = False
    addresses: bool = False
    mapped: bool = False


def _read_page(reader: StreamReader, layout: RamLayout) -> bytes:
    return reader.read(layout.page_size, "a page")


def _read_fill(reader: StreamReader, _: RamLayout) -> bytes:
    return reader.read(1, "a page's fill byte")


def _read_xbzrle(reader: StreamReader, layout: RamLayout) -> bytes:
    head = reader.read(3, "the head of an XBZRLE page")
    return head + reader.read(int.from_bytes(head[1:], "big"), "an XBZRLE page", layout.page_size)


def _read_compressed(reader: StreamReader, layout: RamLayout) -> bytes:
    head = reader.read(4, "the length of a compressed page")
    # zlib's worst case (compressBound) stays below twice the page.
    return head + reader.read(int.from_bytes(head, "big"), "a compressed page", 2 * layout.page_size)


PAGE_BODIES: Final[Mapping[RamFlag, Callable[[StreamReader, RamLayout], bytes]]] = {
    RamFlag.PAGE: _read_page,
    RamFlag.ZERO: _read_fill,
    RamFlag.XBZRLE: _read_xbzrle,
    RamFlag.COMPRESS_PAGE: _read_compressed,
}
"""Records that are about one page, and name its block unless CONTINUE is set."""

CONTINUE: Final = int(RamFlag.CONTINUE)

MARKS: Final = frozenset({RamFlag.EOS, RamFlag.MULTIFD_FLUSH})
"""Records that consist of the first word only."""


OBSOLETE: Final = frozenset({RamFlag.FULL, RamFlag.HOOK})
"""Records whose bodies cannot be read here: an old kind of page, and RDMA's own."""

_FLAGS: Final[Mapping[int, tuple[RamFlag, RamFlag]]] = {
    **{int(kind): (kind, kind) for kind in (RamFlag.MEM_SIZE, *MARKS, *OBSOLETE, *PAGE_BODIES)},
    **{
        int(kind | RamFlag.CONTINUE): (kind | RamFlag.CONTINUE, kind)
        for kind in (RamFlag.MULTIFD_FLUSH, *OBSOLETE, *PAGE_BODIES)
    },
}
"""Bits below the page size -> the flags, and the kind. A table, because the arithmetic of IntFlag takes longer than the
rest of a record."""


class RamHeader(NamedTuple):
    """The header of a record.

    flags     the flags as sent
    kind      the flags without CONTINUE
    address   offset in the block in bytes; for MEM_SIZE the sum of the blocks' lengths; otherwise 0
    named     the name of a block follows; a page record without one continues the block of the previous record
    """

    flags: RamFlag
    kind: RamFlag
    address: int
    named: bool


def read_ram_header(reader: StreamReader, page_size: int = TARGET_PAGE_SIZE) -> RamHeader:
    """Read the header of a record. The caller checks whether the block exists and has such an offset.

    Raises RemoteStreamError for unknown flags, ChannelError.
    """
    word = reader.be64("a RAM record's header")
    raw, address = word & (page_size - 1), word & ~(page_size - 1)
    if raw not in _FLAGS:
        raise reader.error("a RAM record", f"one with the flags {raw:#x}")
    flags, kind = _FLAGS[raw]
    return RamHeader(flags, kind, address, kind in PAGE_BODIES and not raw & CONTINUE)


def read_block_name(reader: StreamReader) -> str:
    """Read the name after the header of a record that has one."""
    return reader.string("a RAM block's name")


def read_ram_record(reader: StreamReader, layout: RamLayout) -> RamRecord:
    """Read a whole record, EOS included. Raises as read_ram_header() does."""
    flags, kind, address, named = read_ram_header(reader, layout.page_size)
    if kind in PAGE_BODIES:
        idstr = read_block_name(reader) if named else None
        return RamRecord(flags, address, idstr, PAGE_BODIES[kind](reader, layout))
    if kind is RamFlag.MEM_SIZE:
        entries = read_block_list(reader, address, page_sizes=layout.page_sizes, addresses=layout.addresses)
        blocks = tuple(_count_mapped(reader, layout, entry) if layout.mapped else entry for entry in entries)
        return RamRecord(flags, address, blocks=blocks)
    if kind in OBSOLETE or flags != kind:
        raise reader.error("a RAM record", f"one with the flags {int(flags):#x}")
    return RamRecord(flags, address)


def _count_mapped(reader: StreamReader, layout: RamLayout, entry: BlockEntry) -> BlockEntry:
    """Count the pages that are in the file after the entry, and skip them."""
    header = read_mapped_header(reader, layout.page_size, entry.length)
    present = sum(int.from_bytes(piece).bit_count() for piece in read_bitmap(reader, header, entry.length))
    if present > entry.length // layout.page_size:
        raise reader.error(f"at most the {entry.length // layout.page_size} pages of '{entry.idstr}'", f"{present}")
    reader.pass_to(header.pages_offset + entry.length, f"what follows the pages of '{entry.idstr}'")
    return replace(entry, mapped=present)


def write_ram_record(writer: StreamWriter, record: RamRecord) -> None:
    writer.be64(record.address | record.flags)
    if record.idstr is not None:
        writer.string(record.idstr)
    write_block_list(writer, record.blocks)
    writer.write(record.body)
