"""The destination's half: records into guest RAM.

Invariant: nothing of a record stays in RAM unless its block, its offset and its flags are right. Runs of records of one
kind are recognised in the receive buffer with NumPy and stored in one go, or received straight into RAM (direct.py);
whatever is not such a run is read one record at a time.

Threads: the incoming thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MachineError
from corefw.machine import Machine, RamBlock, RamMakingMachine
from corefw.quantities import format_size
from corefw.section import IncomingContext
from corefw.wire.constants import TARGET_PAGE_SIZE, RamFlag
from corefw.wire.records import MAPPED_RAM, BlockEntry, read_block_list, read_block_name, read_ram_header
from corefw.wire.stream import BULK_BUFFER_SIZE, StreamReader
from corefw_ram.direct import DirectReceiver, InPlaceReceiver
from corefw_ram.mapped import load_mapped_pages
from corefw_ram.records import HEADER, PAGE_RECORD, ZERO_RECORD

FLAGS: Final = TARGET_PAGE_SIZE - 1
LITTLE: Final = 1 << 14
"""Bytes that are read ahead where pages are received past the reader's buffer: what is in it has to be copied."""
LONG_RUN: Final = 4
"""Records of one kind in the buffer from which on NumPy is worth its calls."""

StoreRun = Callable[["LoadedBlock", NDArray[np.int64], NDArray[np.uint8]], None]
"""Stores a run of records: (block, pages, the records' bodies, one a row)."""

REFUSED: Final = {
    RamFlag.FULL: "a record of an obsolete kind (RAM_SAVE_FLAG_FULL; send it again from a newer QEMU)",
    RamFlag.XBZRLE: "an XBZRLE page (switch capability 'xbzrle' off on the source)",
    RamFlag.HOOK: "an RDMA record (migrate with another transport than rdma:)",
    RamFlag.COMPRESS_PAGE: "a compressed page (switch capability 'compress' off on the source)",
    RamFlag.MULTIFD_FLUSH: "a multifd record (switch capability 'multifd' off on the source)",
}


class LoadedBlock:
    """A block of the destination, and how the next pages of it are received.

    read_ahead   bytes that are received and stored at once, at most
    """

    read_ahead: int = BULK_BUFFER_SIZE

    def __init__(self, block: RamBlock, direct: InPlaceReceiver) -> None:
        """Before anything is stored in it."""
        self.block: Final = block
        self.direct: Final = direct

    def store(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self.block.store(pages, data)
        self.direct.note_stored(pages)

    def fill(self, pages: NDArray[np.int64], value: int) -> None:
        self.block.fill(pages, value)
        if value:
            self.direct.note_stored(pages)
        else:
            self.direct.note_zeroed()


class PageLoader:
    """Loads the bodies of one migration's 'ram' sections.

    listed   the list of RAM blocks has come, and fits the machine's
    """

    def __init__(self, machine: Machine, context: IncomingContext) -> None:
        self._machine = machine
        self._context = context
        self._blocks = {block.idstr: LoadedBlock(block, DirectReceiver(block)) for block in machine.ram_blocks()}
        self._block: LoadedBlock | None = None
        self.listed = False
        self._records: dict[RamFlag, Callable[[StreamReader, int], None]] = {
            RamFlag.MEM_SIZE: self._load_block_list,
            RamFlag.PAGE: self._load_page,
            RamFlag.ZERO: self._load_zero,
        }
        self._runs: dict[int, tuple[int, StoreRun]] = {
            RamFlag.PAGE | RamFlag.CONTINUE: (PAGE_RECORD, _store_pages),
            RamFlag.ZERO | RamFlag.CONTINUE: (ZERO_RECORD, _store_zeros),
        }

    def load(self, reader: StreamReader) -> None:
        """One body, up to and including its EOS."""
        while True:
            if self._block is not None:
                while self._block.direct.receive(reader) or self._load_run(reader, self._block):
                    pass
            self._choose_read_ahead(reader)
            header = read_ram_header(reader)
            if header.kind is RamFlag.EOS:
                if self._block is not None:
                    self._block.direct.end_body()
                return
            load = self._records.get(header.kind)
            if load is None:
                raise reader.error("a RAM record", REFUSED[header.kind])
            if header.named:
                self._block = self._named_block(reader, read_block_name(reader))
            load(reader, header.address)

    def _choose_read_ahead(self, reader: StreamReader) -> None:
        """Little where a run of pages is to be received past the reader's buffer: what is in it has to be copied."""
        blocks = self._blocks.values() if self._block is None else (self._block,)
        direct = reader.receives_memory and any(block.direct.expects for block in blocks)
        most = min((block.read_ahead for block in blocks), default=BULK_BUFFER_SIZE)
        reader.read_ahead = LITTLE if direct else min(most, len(reader.buffer))

    # -- one record ------------------------------------------------------------------------------------------------

    def _named_block(self, reader: StreamReader, name: str) -> LoadedBlock:
        block = self._blocks.get(name)
        if block is None:
            raise reader.error(f"one of the RAM blocks {', '.join(self._blocks) or '(none)'}", f"block '{name}'")
        return block

    def _page_of(self, reader: StreamReader, offset: int) -> tuple[LoadedBlock, NDArray[np.int64]]:
        block = self._block
        if block is None:
            raise reader.error("a record that names its RAM block", "one that goes on with the block before")
        if offset >= block.block.length:
            raise _outside(reader, block.block, offset)
        return block, np.array([offset // TARGET_PAGE_SIZE])

    def _load_page(self, reader: StreamReader, offset: int) -> None:
        block, page = self._page_of(reader, offset)
        data = np.frombuffer(reader.read(TARGET_PAGE_SIZE, "a page"), dtype=np.uint8)
        block.store(page, data.reshape(1, TARGET_PAGE_SIZE))

    def _load_zero(self, reader: StreamReader, offset: int) -> None:
        block, page = self._page_of(reader, offset)
        block.fill(page, reader.u8("a page's fill byte"))

    def _load_block_list(self, reader: StreamReader, total: int) -> None:
        mapped = MAPPED_RAM in self._context.stream_capabilities
        found = read_block_list(reader, total, page_sizes="postcopy-ram" in self._context.stream_capabilities)
        entries = [self._load_mapped(reader, entry) for entry in found] if mapped else self._take(reader, list(found))
        if missing := self._blocks.keys() - {entry.idstr for entry in entries}:
            raise reader.error(f"all RAM blocks of this machine ({', '.join(self._blocks)})", f"none '{min(missing)}'")
        self.listed = True

    def _load_mapped(self, reader: StreamReader, entry: BlockEntry) -> BlockEntry:
        """A block whose pages stand behind its entry."""
        self._take(reader, [entry])
        loaded = self._blocks[entry.idstr]
        for stored in load_mapped_pages(reader, loaded.block):
            loaded.direct.note_stored(stored)
        return entry

    def _take(self, reader: StreamReader, entries: Sequence[BlockEntry]) -> Sequence[BlockEntry]:
        """Have blocks as the stream announces them; the same entries."""
        if isinstance(self._machine, RamMakingMachine):
            self._make_blocks(reader, self._machine, entries)
        for entry in entries:
            self._check_entry(reader, entry)
        return entries

    def _make_blocks(self, reader: StreamReader, machine: RamMakingMachine, entries: Sequence[BlockEntry]) -> None:
        lengths = {entry.idstr: entry.length for entry in entries if entry.idstr not in self._blocks}
        try:
            made = machine.make_ram_blocks(lengths)
        except MachineError as error:
            raise reader.error("RAM blocks that this machine can have", str(error)) from error
        self._blocks |= {block.idstr: LoadedBlock(block, DirectReceiver(block)) for block in made}

    def _check_entry(self, reader: StreamReader, entry: BlockEntry) -> None:
        loaded = self._blocks.get(entry.idstr)
        if loaded is None:
            raise reader.error(f"one of the RAM blocks {', '.join(self._blocks) or '(none)'}", f"block '{entry.idstr}'")
        block = loaded.block
        if entry.page_size is not None:
            self._check_host_pages(reader, entry)
            block.host_page_size = entry.page_size
        if block.length != entry.length:
            raise reader.error(
                f"RAM block '{entry.idstr}' of {block.length} bytes ({format_size(block.length)})",
                f"one of {entry.length} bytes ({format_size(entry.length)}); start both sides with the same RAM size",
            )

    def _check_host_pages(self, reader: StreamReader, entry: BlockEntry) -> None:
        """The source's host has huge pages there."""
        assert entry.page_size is not None
        if not isinstance(self._machine, RamMakingMachine) or entry.length % entry.page_size:
            got = f"one of {entry.length} bytes with pages of {entry.page_size}"
            raise reader.error(f"RAM block '{entry.idstr}' with pages of {TARGET_PAGE_SIZE} bytes", got)

    # -- runs of records -------------------------------------------------------------------------------------------

    def _load_run(self, reader: StreamReader, block: LoadedBlock) -> bool:
        """Store the whole records of one kind at the buffer's start; False when another way has to be gone: a record of
        another kind, too few of them to be worth it, or the end of the stream inside one."""
        start, end = reader.span()
        if end - start < HEADER:
            return False
        flags = reader.buffer[start + 7] | (reader.buffer[start + 6] & 0xF) << 8
        if flags not in self._runs:
            return False
        size, store = self._runs[flags]
        while end - start < size:  # the rest of a record will come, and more with it
            if not reader.fill():
                return False
            start, end = reader.span()
        count = (end - start) // size
        offsets = _offsets_at(reader, count, size, flags)
        if len(offsets) < min(count, LONG_RUN):
            return False
        self._check_offsets(reader, block.block, offsets, size)
        store(block, offsets // TARGET_PAGE_SIZE, _bodies_at(reader, len(offsets), size))
        reader.skip(len(offsets) * size)
        return True

    def _check_offsets(self, reader: StreamReader, block: RamBlock, offsets: NDArray[np.int64], size: int) -> None:
        if offsets.min() >= 0 and offsets.max() < block.length:
            return
        outside = int(np.flatnonzero((offsets < 0) | (offsets >= block.length))[0])
        reader.skip(outside * size)
        raise _outside(reader, block, int(np.uint64(offsets[outside])))


def _store_pages(block: LoadedBlock, pages: NDArray[np.int64], bodies: NDArray[np.uint8]) -> None:
    block.store(pages, bodies)


def _store_zeros(block: LoadedBlock, pages: NDArray[np.int64], bodies: NDArray[np.uint8]) -> None:
    fills = bodies[:, 0]
    cuts = np.flatnonzero(np.diff(fills)) + 1  # nearly always none; in their order, for a page may come twice
    for some, values in zip(np.split(pages, cuts), np.split(fills, cuts), strict=True):
        block.fill(some, int(values[0]))


def _offsets_at(reader: StreamReader, count: int, size: int, flags: int) -> NDArray[np.int64]:
    """The byte offsets of the `count` records of `size` bytes at the buffer's start, up to the first with other
    flags."""
    start, _ = reader.span()
    words = np.ndarray(count, ">u8", reader.buffer, start, (size,)).astype(np.uint64)
    words ^= np.uint64(flags)
    others = words & np.uint64(FLAGS)
    if others.any():
        words = words[: int(np.flatnonzero(others)[0])]
    return words.view(np.int64)


def _bodies_at(reader: StreamReader, count: int, size: int) -> NDArray[np.uint8]:
    """What follows the headers of these records, one a row. A view: valid until the next read."""
    start, _ = reader.span()
    return np.ndarray((count, size - HEADER), np.uint8, reader.buffer, start + HEADER, (size, 1))


def _outside(reader: StreamReader, block: RamBlock, offset: int) -> Exception:
    return reader.error(f"an offset below {block.length:#x} in RAM block '{block.idstr}'", f"{offset:#x}")
