"""What the ram section carries: the list of blocks that MEM_SIZE announces.

Source: QEMU 7.2's ram_save_setup and ram_load_precopy (migration/ram.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from corefw.wire.stream import StreamReader, StreamWriter

MAX_BLOCKS: Final = 4096
"""RAM blocks that one stream may announce; QEMU machines have tens."""


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """A RAM block as MEM_SIZE announces it. `length` is the used length in bytes.

    page_size   the host's page size for this block; sent only with postcopy-ram, where it is not the usual one
    address     the guest address; sent only with x-ignore-shared
    """

    idstr: str
    length: int
    page_size: int | None = None
    address: int | None = None


def read_block_list(
    reader: StreamReader, total: int, *, page_sizes: bool = False, addresses: bool = False
) -> list[BlockEntry]:
    """Entries until their lengths add up to `total`, the rest of the MEM_SIZE word.

    `page_sizes`: POSTCOPY_ADVISE came, so an entry may carry one. `addresses`: x-ignore-shared is on, each carries one.
    """
    entries: list[BlockEntry] = []
    names: set[str] = set()
    left = total
    while left > 0:
        if len(entries) == MAX_BLOCKS:
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
        entries.append(entry)
    return entries


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
        writer.string(entry.idstr)
        writer.be64(entry.length)
        if entry.page_size is not None:
            writer.be64(entry.page_size)
        if entry.address is not None:
            writer.be64(entry.address)
