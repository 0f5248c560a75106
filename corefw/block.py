"""The contract for disks: block nodes of a machine, and the dirty bitmaps that record what the guest writes to them.

A dirty bitmap has one bit for each granule of the node. While it is enabled, every write of the guest sets the bits of
the granules that it touches; the bitmap thus says what a backup has to copy again. Names, states and errors are QEMU's
(block/dirty-bitmap.c, 10.0). The bits live in the engine's memory only.

Exactness: a write counts when it completes. A bitmap that is created, enabled or cleared afterwards does not have it;
one that was enabled before has it, whatever happened to the guest meanwhile. A node may collect the guest's writes as
late as it likes, because every operation on a bitmap first takes in what was written before (BlockNode.settled).

Threads: all methods may be called from any thread at any time. A node has one lock for all of its bitmaps.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import StateError, UsageError

SECTOR: Final = 512
MAX_GRANULARITY: Final = 1 << 31
MAX_BITMAP_NAME: Final = 1023
"""Bytes."""

ByteRuns = NDArray[np.int64]
"""Ranges of bytes: rows (first, end), `end` exclusive, shape (n, 2)."""

_POPCOUNT: Final = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
_BLOCK: Final = 1 << 20
"""Bytes of a bitmap that are unpacked at a time."""


def no_byte_runs() -> ByteRuns:
    return np.empty((0, 2), dtype=np.int64)


def _set_bits(bits: NDArray[np.uint8], indices: NDArray[np.int64], masks: NDArray[np.uint8]) -> None:
    """Or masks into the bytes with these indices, which ascend and may repeat."""
    if len(indices):
        new = np.flatnonzero(np.diff(indices, prepend=-1))
        bits[indices[new]] |= np.bitwise_or.reduceat(masks, new)


class DirtyBitmap:
    """A named dirty bitmap of one node; BlockNode.add_bitmap() creates it.

    node          the node that it belongs to
    name          unique among the node's bitmaps
    granularity   bytes of a granule: a power of two, 512 or more
    size          number of bits: the node's length in granules, rounded up

    The serialized form is QEMU's: the bits in ascending order, the least significant bit of a byte first, padded with
    zeros to whole words of 8 bytes. What serialize() and merge_bits() take is a range of the node in bytes, which
    begins at a multiple of `alignment` and ends at one or at the end of the node.
    """

    def __init__(self, node: BlockNode, name: str, granularity: int, *, enabled: bool, persistent: bool) -> None:
        self.node: Final = node
        self.name: Final = name
        self.granularity: Final = granularity
        self.size: Final = -(-node.length // granularity)
        self._shift: Final = granularity.bit_length() - 1
        self._bits = np.zeros(max(1, -(-self.size // 64)) * 8, dtype=np.uint8)
        self._enabled = enabled
        self._persistent = persistent
        self._busy = False
        self._inconsistent = False

    def __repr__(self) -> str:
        return f"<DirtyBitmap '{self.name}' of '{self.node.name}'>"

    # -- states ----------------------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether it records what the guest writes ("recording" in query-block). A busy bitmap may record too."""
        return self._enabled

    @property
    def persistent(self) -> bool:
        """Whether it would be stored in the image. Here that is only a flag, which travels with the bitmap."""
        return self._persistent

    @property
    def busy(self) -> bool:
        """Whether an operation, such as a migration, is using it: commands refuse it until that ends."""
        return self._busy

    @property
    def inconsistent(self) -> bool:
        """Whether it may lack bits. It records nothing and is good for nothing; it can only be removed."""
        return self._inconsistent

    def enable(self) -> None:
        """Record the writes that complete from now on. Does nothing for an inconsistent bitmap."""
        with self.node.settled():
            self._enabled = not self._inconsistent

    def disable(self) -> None:
        """Keep the bits as they are. Writes that completed before are in them."""
        with self.node.settled():
            self._enabled = False

    def set_busy(self, busy: bool) -> None:
        """Set or reset `busy`. The caller makes sure that nothing else uses the bitmap; see check()."""
        with self.node.settled():
            self._busy = busy

    def mark_inconsistent(self) -> None:
        """Declare that bits may be missing, for good. Also ends `enabled` and `busy`."""
        with self.node.settled():
            self._inconsistent = True
            self._enabled = self._busy = False

    def check(self) -> None:
        """Raise StateError, with QEMU's text, if the bitmap cannot be used because it is busy or inconsistent."""
        self.check_idle()
        if self._inconsistent:
            raise StateError(
                f"Bitmap '{self.name}' is inconsistent and cannot be used (block-dirty-bitmap-remove deletes it)"
            )

    def check_idle(self) -> None:
        """Raise StateError, with QEMU's text, if the bitmap is busy."""
        if self._busy:
            raise StateError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")

    # -- bits ------------------------------------------------------------------------------------------------------

    def count(self) -> int:
        """Bytes in dirty granules. The last granule counts as a whole one."""
        with self.node.settled():
            return int(_POPCOUNT[self._bits].sum(dtype=np.int64)) << self._shift

    def runs(self) -> ByteRuns:
        """The dirty ranges of the node in ascending order. Neighbours may touch; the last ends at the node's length."""
        with self.node.settled():
            return self._runs()

    def clear(self) -> None:
        """Reset all bits. Writes that completed before are not in it any more."""
        with self.node.settled():
            self._bits[:] = 0

    def mark(self, runs: ByteRuns) -> None:
        """Set the bits of all granules that these ranges touch; the ranges may lie in any order and overlap, and parts
        beyond the node's end are ignored."""
        with self.node.settled():
            self._mark(runs)

    def merge(self, sources: Sequence[DirtyBitmap]) -> None:
        """Set the bits of all granules that are dirty in one of these bitmaps, of this node or others, with whatever
        granularity. Raises StateError, and changes nothing, if one of them has another length or cannot be used."""
        self.check()
        found: list[ByteRuns] = []
        for source in sources:
            source.check()
            if source.node.length != self.node.length:
                raise StateError(
                    f"Bitmaps are of different sizes (destination size is {self.node.length}, source size is"
                    f" {source.node.length}) and can't be merged"
                )
            found.append(source.runs())
        with self.node.settled():
            self.check()
            for runs in found:
                self._mark(runs)

    def sha256(self) -> str:
        """The digest of the serialized bits of the whole node, in hexadecimal: what QEMU's
        x-debug-block-dirty-bitmap-sha256 gives for equal bits on a little-endian host."""
        with self.node.settled():
            return hashlib.sha256(self._bits.data).hexdigest()

    # -- the serialized form ---------------------------------------------------------------------------------------

    @property
    def alignment(self) -> int:
        """Bytes of the node that one word of the serialized form covers."""
        return 64 << self._shift

    def serialized_size(self, offset: int, length: int) -> int:
        """Bytes of the serialized form of this range. Raises ValueError, with a phrase, if it is not a range of the
        node, or is not aligned."""
        first, end = self._byte_range(offset, length)
        return end - first

    def serialize(self, offset: int, length: int) -> bytes:
        """The bits of this range. Raises ValueError as serialized_size() does."""
        first, end = self._byte_range(offset, length)
        with self.node.settled():
            return self._bits[first:end].tobytes()

    def merge_bits(self, offset: int, length: int, data: bytes | bytearray | memoryview) -> None:
        """Set the bits that are set in `data`, the serialized form of this range; the others stay as they are. Bits
        beyond the node's end are ignored. Raises ValueError as serialized_size() does, or for data of another size."""
        first, end = self._byte_range(offset, length)
        if len(data) != end - first:
            raise ValueError(f"{len(data)} bytes of bits for a range that takes {end - first}")
        with self.node.settled():
            self._bits[first:end] |= np.frombuffer(data, dtype=np.uint8)
            self._drop_tail()

    def _byte_range(self, offset: int, length: int) -> tuple[int, int]:
        node_end, end = self.node.length, offset + length
        if not 0 <= offset < end <= node_end:
            raise ValueError(f"a range from {offset} to {end} in a node of {node_end} bytes")
        if offset % self.alignment or (end % self.alignment and end != node_end):
            raise ValueError(f"a range from {offset} to {end} that is not aligned to {self.alignment}")
        return (offset >> self._shift) // 8, -(-end // self.alignment) * 8

    def _drop_tail(self) -> None:
        whole, rest = divmod(self.size, 8)
        if rest:
            self._bits[whole] &= (1 << rest) - 1
            whole += 1
        self._bits[whole:] = 0

    # -- for the node, which holds the lock ------------------------------------------------------------------------

    def _mark(self, runs: ByteRuns) -> None:
        first, last = self._granules(runs)
        low, high = first >> 3, last >> 3
        low_mask = (0xFF << (first & 7) & 0xFF).astype(np.uint8)
        high_mask = (0xFF >> (7 - (last & 7))).astype(np.uint8)
        one = low == high
        _set_bits(self._bits, low, np.where(one, low_mask & high_mask, low_mask))
        _set_bits(self._bits, high[~one], high_mask[~one])
        wide = high - low > 1
        for before, after in zip(low[wide].tolist(), high[wide].tolist(), strict=True):
            self._bits[before + 1 : after] = 0xFF

    def _granules(self, runs: ByteRuns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first and last granules of what these ranges touch, in ascending order and apart."""
        start, end = np.maximum(runs[:, 0], 0), np.minimum(runs[:, 1], self.node.length)
        some = start < end
        first, last = start[some] >> self._shift, (end[some] - 1) >> self._shift
        if len(first) < 2:
            return first, last
        if (first[1:] < first[:-1]).any():
            order = np.argsort(first, kind="stable")
            first, last = first[order], last[order]
        furthest = np.maximum.accumulate(last)
        apart = np.flatnonzero(first[1:] > furthest[:-1] + 1)
        return first[np.append(0, apart + 1)], furthest[np.append(apart, len(last) - 1)]

    def _runs(self) -> ByteRuns:
        found = [no_byte_runs()]
        for start in range(0, len(self._bits), _BLOCK):
            block = self._bits[start : start + _BLOCK]
            if not block.any():
                continue
            bits = np.unpackbits(block, bitorder="little")
            edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0))).astype(np.int64)
            found.append((edges.reshape(-1, 2) + start * 8) << self._shift)
        return np.minimum(np.concatenate(found), self.node.length)


class BlockNode:
    """A disk of the guest, with its dirty bitmaps.

    name       the node name; unique in the machine
    device     the name of the device; "" if it has none. In a migration stream the node is called by it, else by `name`
    length     bytes, a multiple of 512
    filename   where the data are, for people
    driver     the image format: "raw"
    """

    driver: str = "raw"

    def __init__(self, name: str, length: int, *, device: str = "", filename: str = "") -> None:
        if length < 0 or length % SECTOR:
            raise ValueError(f"block node '{name}': {length} bytes are not a multiple of {SECTOR}")
        self.name: Final = name
        self.device: Final = device
        self.length: Final = length
        self.filename: Final = filename
        self._lock = threading.RLock()
        self._settled = False  # inside settled()
        self._bitmaps: list[DirtyBitmap] = []

    def __repr__(self) -> str:
        return f"<BlockNode '{self.name}'>"

    def collect(self) -> ByteRuns:
        """Return the ranges that the guest's writes touched since the last call. Override it in a node that a guest
        here writes to.

        Called with the node's lock held, from any thread; must be quick, must not wait for the guest and must not
        raise. A write that completed before the call is in this answer, or was in an earlier one; one that completes
        during the call is in this answer or the next.
        """
        return no_byte_runs()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Hold the node's lock during the block, with every write that completed before in the bitmaps. Re-entrant.

        All that happens inside is one operation: writes that complete meanwhile come after it. So `runs()` and then
        `clear()` lose nothing. Do not lock a second node inside, unless every caller that does locks them in the order
        of their names.
        """
        with self._lock:
            if not self._settled:
                self._mark_written(self.collect())
            outer, self._settled = self._settled, True
            try:
                yield
            finally:
                self._settled = outer

    def _mark_written(self, written: ByteRuns) -> None:
        for bitmap in self._bitmaps:
            if bitmap.enabled:
                bitmap._mark(written)

    @property
    def bitmaps(self) -> Sequence[DirtyBitmap]:
        """All bitmaps, the newest first as in QEMU."""
        with self._lock:
            return tuple(self._bitmaps)

    def bitmap(self, name: str) -> DirtyBitmap:
        """The bitmap with this name. Raises UsageError, with QEMU's text."""
        found = self.find_bitmap(name)
        if found is None:
            raise UsageError(f"Dirty bitmap '{name}' not found")
        return found

    def find_bitmap(self, name: str) -> DirtyBitmap | None:
        """The bitmap with this name; None if there is none."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)

    def add_bitmap(
        self,
        name: str,
        granularity: int,
        *,
        enabled: bool = True,
        persistent: bool = False,
        busy: bool = False,
    ) -> DirtyBitmap:
        """Create an empty bitmap, which records from now on if it is `enabled`. Raises UsageError: with QEMU's texts
        for a name that is empty, too long or taken, and for a wrong granularity; and if the host has no memory."""
        if not name:
            raise UsageError("Bitmap name cannot be empty")
        if len(name.encode()) > MAX_BITMAP_NAME:
            raise UsageError(f"Bitmap name too long: {name}")
        if not SECTOR <= granularity <= MAX_GRANULARITY or granularity & (granularity - 1):
            raise UsageError("Granularity must be power of 2 and at least 512")
        with self.settled():
            if self.find_bitmap(name) is not None:
                raise UsageError(f"Bitmap already exists: {name}")
            try:
                bitmap = DirtyBitmap(self, name, granularity, enabled=enabled, persistent=persistent)
            except MemoryError:
                raise UsageError(
                    f"no memory for the bits of '{name}', one for each {granularity} of {self.length} bytes"
                    " (use a larger granularity)"
                ) from None
            bitmap._busy = busy
            self._bitmaps.insert(0, bitmap)
            return bitmap

    def snapshot(self) -> Callable[[], None]:
        """A function that restores the bitmaps that there are now, with their bits, and whether they record. Call both
        inside one settled()."""
        saved = [(bitmap, bitmap._bits.copy(), bitmap.enabled) for bitmap in self._bitmaps]

        def restore() -> None:
            self._bitmaps = [bitmap for bitmap, _, _ in saved]
            for bitmap, bits, enabled in saved:
                bitmap._bits, bitmap._enabled = bits, enabled

        return restore

    def remove_bitmap(self, bitmap: DirtyBitmap) -> None:
        """Remove a bitmap, whatever its state; see DirtyBitmap.check_idle(). Does nothing if it is not here."""
        with self._lock:
            if bitmap in self._bitmaps:
                self._bitmaps.remove(bitmap)


def bitmaps_of(nodes: Iterable[BlockNode]) -> list[dict[str, object]]:
    """The bitmaps of all nodes as JSON values, for a machine's information(): names, bytes that are dirty, and whether
    they are inconsistent."""
    return [
        {"node": node.name, "name": one.name, "dirty": one.count(), "inconsistent": one.inconsistent}
        for node in nodes
        for one in node.bitmaps
    ]
