"""The destination's half: collect the bits of every bitmap, and set them when all have arrived.

A bitmap of a machine with disks is created at its START. It is busy, and records writes as soon as the guest runs, so
its bits may also arrive afterwards. A parked machine has no disks: the node and the bitmap are created when all bits
have arrived, because only then the node's length is known.

If the connection breaks after the guest has started, the source may come back. A migfw then sends every bitmap again. A
QEMU continues after the last bits that it sent, even if those were lost. So after a break a record counts only if it is
certain which bitmap it belongs to, and a bitmap that lacks bits at its COMPLETE is inconsistent.

Invariant: a bitmap that can be used is complete. An incomplete one is removed or, if the guest may have run, marked
inconsistent.

Source: QEMU 11.1, dirty_bitmap_load (migration/block-dirty-bitmap.c), which drops all bitmaps and continues where this
module refuses the migration. Threads: as corefw.section says.
"""

from __future__ import annotations

import logging
from typing import Final

from corefw.block import BlockNode, DirtyBitmap
from corefw.errors import MigfwError
from corefw.machine import BlockMachine, BlockMakingMachine, FaultSource
from corefw.postcopy import PostcopyLoader
from corefw.section import IncomingContext
from corefw.settings import Settings
from corefw.wire.records import (
    BITMAPS_IDSTR,
    BITMAPS_VERSION,
    MAX_CHUNK_BYTES,
    SECTOR,
    BitmapFlag,
    BitmapRecord,
    StartFlag,
    bits_size,
    padded_size,
    read_bitmap_record,
)
from corefw.wire.stream import StreamReader
from corefw_dirty_bitmap.mapping import BitmapAlias, NodeAlias, mapping_of

log = logging.getLogger(__name__)

MAX_BITMAPS: Final = 10_000
MAX_BITS: Final = 1 << 30
"""Maximum bytes of bits of all bitmaps of a migration together."""
MAX_CHUNKS: Final = 1 << 20
"""Maximum BITS records of all bitmaps together, not counting repetitions."""

ADVICE: Final = "remove it with block-dirty-bitmap-remove, and make a full backup"


class IncomingBitmap:
    """A bitmap that is arriving.

    node      the machine's node; None in a parked machine until the bitmap is complete
    bitmap    the machine's bitmap; None likewise
    end       bytes of the node up to the last bit that has arrived
    chunks    bits that have arrived: offset -> (length, bits), both numbers in bytes of the node; bits None: zeros
    given_up  the bitmap is inconsistent, and further records for it are dropped
    cut_off   the connection broke and no bits have arrived since, so the last ones may be lost (node of unknown length)
    """

    def __init__(self, node_name: str, name: str, granularity: int, *, enabled: bool, persistent: bool) -> None:
        self.node_name = node_name
        self.name = name
        self.granularity = granularity
        self.enabled = enabled
        self.persistent = persistent
        self.node: BlockNode | None = None
        self.bitmap: DirtyBitmap | None = None
        self.end = 0
        self.complete = False
        self.given_up = False
        self.cut_off = False
        self.chunks: dict[int, tuple[int, bytes | None]] = {}

    def __str__(self) -> str:
        return f"bitmap '{self.name}' of block node '{self.node_name}'"

    def bits(self, length: int) -> int:
        """Bytes of bits that `length` bytes of the node take."""
        return bits_size(length // SECTOR, self.granularity)

    def create(self, node: BlockNode) -> None:
        """Add the bitmap to its node. Raises UsageError."""
        self.node = node
        self.bitmap = node.add_bitmap(
            self.name, self.granularity, enabled=self.enabled, persistent=self.persistent, busy=True
        )

    def gap(self, length: int) -> int | None:
        """The first byte below `length` whose bit has not arrived; None if all have."""
        end = 0
        for offset, (chunk, _) in sorted(self.chunks.items()):
            if offset > end:
                return end
            end = max(end, offset + chunk)
        return end if end < length else None

    def finish(self) -> None:
        """Set all bits, in addition to those that the guest has set meanwhile. Raises ValueError for chunks that are
        not whole words."""
        assert self.bitmap is not None
        for offset, (length, data) in self.chunks.items():
            if data:
                self.bitmap.merge_bits(offset, length, data)
        self.chunks.clear()
        self.bitmap.set_busy(False)
        self.complete = True

    def remove(self) -> None:
        """Remove the bitmap from the machine."""
        if self.bitmap is not None and self.node is not None:
            self.node.remove_bitmap(self.bitmap)
        self.chunks.clear()


class BitmapLoader(PostcopyLoader):
    """QEMU's savevm_dirty_bitmap_handlers."""

    idstr = BITMAPS_IDSTR
    version_id = BITMAPS_VERSION
    minimum_version = BITMAPS_VERSION

    def __init__(self, machine: BlockMachine, settings: Settings) -> None:
        self._machine = machine
        self._settings = settings
        self._mapping: tuple[NodeAlias, ...] | None = None
        self._bitmaps: dict[tuple[str, str], IncomingBitmap] = {}  # by their names in the stream
        self._named: tuple[str | None, str | None] = (None, None)
        self._size = 0  # bytes of bits of all bitmaps
        self._kept = 0  # bytes of those that have come: more only where records overlap
        self._chunks = 0
        self._broken = False  # a connection has broken since listen()

    def required(self) -> bool:
        return False

    def setup(self, context: IncomingContext) -> None:
        self._mapping = mapping_of(self._settings)

    def load(self, reader: StreamReader, version_id: int) -> None:
        if version_id != BITMAPS_VERSION:
            raise reader.error(f"version {BITMAPS_VERSION} of section '{BITMAPS_IDSTR}'", f"version {version_id}")
        while True:
            record = read_bitmap_record(reader)
            self._take(reader, record)
            if BitmapFlag.EOS in record.flags:
                return

    def listen(self, faults: FaultSource) -> None:
        """Do nothing: the bitmaps record the guest's writes from the start."""

    def connection_lost(self) -> None:
        """Forget names that are ambiguous, because a QEMU that resumes omits names that it sent before the break."""
        self._broken = True
        node, bitmap = self._named
        only_node = len({node for node, _ in self._bitmaps}) == 1
        self._named = node if only_node else None, bitmap if len(self._bitmaps) == 1 else None
        for one in self._bitmaps.values():
            one.cut_off = not one.complete

    def cleanup(self) -> None:
        for one in self._bitmaps.values():
            if not one.complete and not one.given_up:
                self._give_up(one)

    def committed(self) -> None:
        self._warn()

    def abandoned(self) -> None:
        for one in self._bitmaps.values():
            one.remove()
        self._bitmaps.clear()

    def _give_up(self, one: IncomingBitmap) -> None:
        """Mark an incomplete bitmap as inconsistent. A parked machine gets it too, so that its user notices."""
        if one.bitmap is None:
            try:
                one.create(self._parked_node(one) or self._make_node(one))
            except MigfwError as error:
                log.warning("%s did not arrive whole, and cannot be shown: %s", one, error)
        if one.bitmap is not None:
            one.bitmap.mark_inconsistent()
        one.given_up = True
        one.chunks.clear()

    def _warn(self) -> None:
        for one in self._bitmaps.values():
            if one.bitmap is not None and one.bitmap.inconsistent:
                log.warning("%s did not arrive whole, and is inconsistent: %s", one, ADVICE)

    # -- names -----------------------------------------------------------------------------------------------------

    def _note_names(self, record: BitmapRecord) -> None:
        node, bitmap = self._named
        self._named = (
            node if record.node is None else record.node,
            bitmap if record.bitmap is None else record.bitmap,
        )

    def _key(self, reader: StreamReader) -> tuple[str, str]:
        node, bitmap = self._named
        if node is None or bitmap is None:
            raise reader.error("the name of a block node and of its bitmap", "neither")
        return node, bitmap

    def _current(self, reader: StreamReader) -> IncomingBitmap | None:
        """The named bitmap, which is between its START and its COMPLETE. After a break: None if it is not certain which
        one it is, or if it is complete already."""
        if self._broken and None in self._named:
            return None
        key = self._key(reader)
        found = self._bitmaps.get(key)
        if self._broken and found is not None and (found.complete or found.given_up):
            return None
        if found is None or found.complete:
            raise reader.error("a bitmap that has begun and not ended", f"'{key[1]}' of block node '{key[0]}'")
        return found

    # -- records ---------------------------------------------------------------------------------------------------

    def _take(self, reader: StreamReader, record: BitmapRecord) -> None:
        self._note_names(record)
        match record.kind:
            case BitmapFlag.START:
                self._start(reader, record)
            case BitmapFlag.BITS:
                if (one := self._current(reader)) is not None:
                    self._bits(reader, one, record)
            case BitmapFlag.COMPLETE:
                if (one := self._current(reader)) is not None:
                    self._complete(reader, one)

    def _start(self, reader: StreamReader, record: BitmapRecord) -> None:
        key = self._key(reader)
        if key in self._bitmaps:
            raise reader.error("each bitmap once", f"'{key[1]}' of block node '{key[0]}' again")
        if len(self._bitmaps) == MAX_BITMAPS:
            raise reader.error(f"at most {MAX_BITMAPS} bitmaps", "more")
        node_name, mapped = self._translate(reader, *key)
        persistent = StartFlag.PERSISTENT in record.start_flags
        one = IncomingBitmap(
            node_name,
            mapped.name,
            record.granularity,
            enabled=StartFlag.ENABLED in record.start_flags,
            persistent=persistent if mapped.persistent is None else mapped.persistent,
        )
        if not isinstance(self._machine, BlockMakingMachine):
            self._create(reader, one, self._find_node(reader, node_name))
        self._bitmaps[key] = one

    def _translate(self, reader: StreamReader, node: str, bitmap: str) -> tuple[str, BitmapAlias]:
        """Translate the names in the stream to those of a node and its bitmap here."""
        if self._mapping is None:
            return node, BitmapAlias(bitmap, bitmap)
        found = next((one for one in self._mapping if one.alias == node), None)
        if found is None:
            raise reader.error("a node alias of block-bitmap-mapping", f"Unknown node alias '{node}'")
        mapped = next((one for one in found.bitmaps if one.alias == bitmap), None)
        if mapped is None:
            got = f"Unknown bitmap alias '{bitmap}' on node '{found.node}' (alias '{node}')"
            raise reader.error("a bitmap alias of block-bitmap-mapping", got)
        return found.node, mapped

    def _find_node(self, reader: StreamReader, name: str) -> BlockNode:
        nodes = self._machine.block_nodes()
        if self._mapping is None:
            node = self._machine.find_node(name)
        else:
            node = next((one for one in nodes if one.name == name), None)
        if node is None:
            known = ", ".join(f"'{one.name}'" for one in nodes) or "none"
            expected = (
                f"the name of a block node of this machine ({known}; block-bitmap-mapping renames those of the stream)"
            )
            raise reader.error(expected, f"'{name}'")
        return node

    def _create(self, reader: StreamReader, one: IncomingBitmap, node: BlockNode) -> None:
        if node.find_bitmap(one.name) is not None:
            raise reader.error(f"no {one} here", "it: Bitmap with the same name already exists on destination")
        self._reserve(reader, one.bits(node.length))
        try:
            one.create(node)
        except MigfwError as error:
            raise reader.error(f"{one} to be created", str(error)) from error

    def _bits(self, reader: StreamReader, one: IncomingBitmap, record: BitmapRecord) -> None:
        offset, length = record.sector * SECTOR, record.sectors * SECTOR
        if offset % (64 * one.granularity):
            raise reader.error(f"bits of {one} from the beginning of a word on", f"those from byte {offset} on")
        if one.node is not None and offset + length > one.node.length:
            raise reader.error(f"bits of {one} within its {one.node.length} bytes", f"{length} from {offset} on")
        size, data = one.bits(length), record.data
        if size > MAX_CHUNK_BYTES:
            raise reader.error(f"at most {MAX_CHUNK_BYTES} bytes of bits in a record", f"{size}")
        if data is not None:
            if not size <= len(data) <= padded_size(size):
                raise reader.error(f"{size} bytes of bits, padded to {padded_size(size)}", f"{len(data)}")
            data = data[:size]
        end = max(one.end, offset + length)
        if one.node is None:
            self._reserve(reader, one.bits(end) - one.bits(one.end))
        if offset not in one.chunks:
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                raise reader.error(f"at most {MAX_CHUNKS} records of bits", "more")
        _, replaced = one.chunks.get(offset, (0, None))
        self._kept += len(data or b"") - len(replaced or b"")
        if self._kept > MAX_BITS:
            raise reader.error(f"at most {MAX_BITS} bytes of bits in all records", f"{self._kept}")
        one.end = end
        one.cut_off = False
        one.chunks[offset] = length, data

    def _reserve(self, reader: StreamReader, size: int) -> None:
        """Count bytes of bits that are about to be allocated, and check the limit."""
        self._size += size
        if self._size > MAX_BITS:
            raise reader.error(f"at most {MAX_BITS} bytes of bits in all bitmaps", f"{self._size}")

    def _complete(self, reader: StreamReader, one: IncomingBitmap) -> None:
        """Handle COMPLETE: check for gaps and set the bits. A parked machine gets the bitmap now."""
        node = self._parked_node(one) if one.node is None else one.node
        length = one.end if node is None else node.length
        gap = one.gap(length)
        lacks_some = gap is not None or one.end != length
        if self._broken and (lacks_some or (node is None and one.cut_off)):
            self._give_up(one)
            return
        if lacks_some:
            raise reader.error(f"the bits of {one} for {length} bytes", f"those for {one.end if gap is None else gap}")
        try:
            if one.node is None:
                one.create(self._make_node(one) if node is None else node)
            one.finish()
        except (MigfwError, ValueError) as error:
            raise reader.error(f"{one} to be created", str(error)) from error

    def _parked_node(self, one: IncomingBitmap) -> BlockNode | None:
        """The node of a parked machine, if it was created for another bitmap already."""
        return next((node for node in self._machine.block_nodes() if node.name == one.node_name), None)

    def _make_node(self, one: IncomingBitmap) -> BlockNode:
        assert isinstance(self._machine, BlockMakingMachine), "others have their nodes from the start"
        return self._machine.make_block_node(one.node_name, one.end)
