"""The source's half: send the bits of every bitmap in chunks of 1024 bytes, and changed chunks again.

QEMU sends no bits while the guest runs. Sending them then does not add to the downtime, and a destination accepts a
chunk more than once. From setup() to cleanup() the bitmaps are busy: no command changes or removes them.

Source: QEMU 10.0, migration/block-dirty-bitmap.c. Threads: as corefw.section says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.block import BlockNode, DirtyBitmap
from corefw.errors import BlockedError, StateError
from corefw.machine import BlockMachine, ParkingMachine
from corefw.postcopy import PostcopySaver
from corefw.section import OutgoingContext, Pending, Priority
from corefw.settings import Settings
from corefw.wire.records import (
    BITMAPS_IDSTR,
    BITMAPS_VERSION,
    CHUNK_BYTES,
    SECTOR,
    BitmapFlag,
    BitmapRecord,
    StartFlag,
    chunk_sectors,
    padded_size,
    write_bitmap_record,
)
from corefw.wire.stream import StreamWriter
from corefw_dirty_bitmap.mapping import MAX_ALIAS, mapping_of

SHOWN: Final = 4
"""Maximum number of bitmaps that an error names."""


class OutgoingBitmap:
    """State of a bitmap that is sent.

    persistent   the bitmap's flag on the destination
    complete     COMPLETE was sent
    """

    def __init__(self, bitmap: DirtyBitmap, node_alias: str, alias: str, *, persistent: bool) -> None:
        self.bitmap = bitmap
        self.node_alias = node_alias
        self.alias = alias
        self.persistent = persistent
        self.complete = False
        self._length = bitmap.node.length
        self._step = chunk_sectors(bitmap.granularity) * SECTOR
        size = bitmap.serialized_size(0, self._length) if self._length else 0
        self._sent = np.zeros(-(-size // CHUNK_BYTES) * CHUNK_BYTES, dtype=np.uint8).reshape(-1, CHUNK_BYTES)
        self._dirty = np.ones(len(self._sent), dtype=np.bool_)

    @property
    def left(self) -> int:
        """Bytes of bits known to be left."""
        return int(np.count_nonzero(self._dirty)) * CHUNK_BYTES

    def harvest(self) -> None:
        """Find the chunks that changed after they were sent."""
        if self._length:
            now = np.zeros_like(self._sent)
            bits = self.bitmap.serialize(0, self._length)
            now.reshape(-1)[: len(bits)] = np.frombuffer(bits, dtype=np.uint8)
            self._dirty |= (now != self._sent).any(axis=1)

    def send_again(self) -> None:
        """Mark everything as unsent, including COMPLETE."""
        self._dirty[:] = True
        self.complete = False

    def next_chunk(self) -> BitmapRecord | None:
        """Return the next chunk and mark it as sent; None if nothing is left."""
        if not self._dirty.any():
            return None
        number = int(self._dirty.argmax())
        self._dirty[number] = False
        at = number * self._step
        length = min(self._step, self._length - at)
        bits = self.bitmap.serialize(at, length)
        self._sent[number, : len(bits)] = np.frombuffer(bits, dtype=np.uint8)
        sector, sectors = at // SECTOR, length // SECTOR
        if not self._sent[number].any():
            return BitmapRecord(BitmapFlag.BITS | BitmapFlag.ZEROES, sector=sector, sectors=sectors)
        data = bits.ljust(padded_size(len(bits)), b"\0")
        return BitmapRecord(BitmapFlag.BITS, sector=sector, sectors=sectors, data=data)


def bitmaps_to_send(machine: BlockMachine, settings: Settings) -> list[OutgoingBitmap]:
    """The bitmaps in the order of the nodes; within a node the oldest last, as QEMU sends them."""
    return [one for node in machine.block_nodes() for one in _of_node(node, settings)]


def _of_node(node: BlockNode, settings: Settings) -> Iterator[OutgoingBitmap]:
    mapping = mapping_of(settings)
    if mapping is None:
        for bitmap in node.bitmaps:
            yield OutgoingBitmap(bitmap, node.device or node.name, bitmap.name, persistent=bitmap.persistent)
        return
    for mapped in mapping:
        if mapped.node != node.name:
            continue
        aliases = {one.name: one for one in mapped.bitmaps}
        for bitmap in node.bitmaps:
            if (found := aliases.get(bitmap.name)) is not None:
                persistent = bitmap.persistent if found.persistent is None else found.persistent
                yield OutgoingBitmap(bitmap, mapped.alias, found.alias, persistent=persistent)


def unusable(bitmaps: Iterable[OutgoingBitmap]) -> list[str]:
    """Reasons why some of these bitmaps cannot be sent; empty if all can."""
    return [reason for one in bitmaps if (reason := _unusable(one)) is not None]


def _unusable(one: OutgoingBitmap) -> str | None:
    node = one.bitmap.node.name
    try:
        one.bitmap.check()
    except StateError as error:
        return f"block node '{node}': {error}"
    if len(one.alias.encode()) > MAX_ALIAS:
        return (
            f"block node '{node}': the name of bitmap '{one.alias}' is longer than {MAX_ALIAS} bytes"
            " (give it an alias with block-bitmap-mapping)"
        )
    return None


def left_behind(machine: BlockMachine) -> list[str]:
    """Reasons why a parked machine would lose bitmaps if it is sent on now; empty if it would not."""
    lost = [f"'{node.name}/{bitmap.name}'" for node in machine.block_nodes() for bitmap in node.bitmaps]
    if not lost:
        return []
    shown = ", ".join(lost[:SHOWN]) + (f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else "")
    several = "s" if len(lost) > 1 else ""
    advice = "(switch capability 'dirty-bitmaps' on, or use block-dirty-bitmap-remove)"
    return [f"the dirty bitmap{several} {shown} would be lost {advice}"]


class BitmapSaver(PostcopySaver):
    """QEMU's savevm_dirty_bitmap_handlers."""

    idstr = BITMAPS_IDSTR
    version_id = BITMAPS_VERSION
    priority = Priority.DEVICES

    def __init__(self, machine: BlockMachine, settings: Settings) -> None:
        self._machine = machine
        self._settings = settings
        self._bitmaps: list[OutgoingBitmap] = []
        self._named: tuple[str | None, str | None] = (None, None)  # what the last record with names was about
        self._busy: list[DirtyBitmap] = []
        self._final = False  # the guest has stopped: no bit changes any more

    def active(self) -> bool:
        """Raises BlockedError if a bitmap cannot be sent."""
        return self._settings.capability("dirty-bitmaps") and bool(self._usable())

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self._bitmaps = self._usable()
        for one in self._bitmaps:
            one.bitmap.set_busy(True)
            self._busy.append(one.bitmap)
        for one in self._bitmaps:
            flags = StartFlag.ENABLED if one.bitmap.enabled else StartFlag(0)
            flags |= StartFlag.PERSISTENT if one.persistent else StartFlag(0)
            granularity = one.bitmap.granularity
            self._write(writer, one, BitmapRecord(BitmapFlag.START, granularity=granularity, start_flags=flags))
        _end_body(writer)

    def pending_estimate(self) -> Pending:
        left = sum(one.left for one in self._bitmaps)
        return Pending(0, left) if self.follows_later() else Pending(left, 0)

    def pending_exact(self) -> Pending:
        for one in self._bitmaps:
            one.harvest()
        return self.pending_estimate()

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        through = self._send(writer, budget)
        _end_body(writer)
        return through

    def complete(self, writer: StreamWriter) -> None:
        if not self._final:
            self.pending_exact()
            self._final = True
        self._send(writer, None)
        _end_body(writer)

    def follows_later(self) -> bool:
        """Whether bitmaps may follow the guest. Those of a parked machine do not change, so they are sent before it.
        QEMU 7.2 and 10.0 abort if a second node's bitmaps arrive in postcopy (bdrv_lookup_bs off the main thread)."""
        return not isinstance(self._machine, ParkingMachine)

    def begin_postcopy(self, writer: StreamWriter) -> None:
        self.pending_exact()
        self._final = True

    def prepare_resume(self, received: Callable[[str, int], NDArray[np.bool_]]) -> None:
        """Send every bitmap again, with all names: what was under way is lost, and the destination drops the rest."""
        self._named = (None, None)
        for one in self._bitmaps:
            one.send_again()

    def cleanup(self) -> None:
        for bitmap in self._busy:
            bitmap.set_busy(False)
        self._busy.clear()

    def _usable(self) -> list[OutgoingBitmap]:
        bitmaps = bitmaps_to_send(self._machine, self._settings)
        if reasons := unusable(bitmaps):
            raise BlockedError(reasons)
        return bitmaps

    # -- records ---------------------------------------------------------------------------------------------------

    def _send(self, writer: StreamWriter, budget: int | None) -> bool:
        """Send chunks of about `budget` bytes, or all of them; return whether nothing is left. A bitmap is complete
        once its last chunk was sent after the guest had stopped."""
        begin = writer.position
        for one in self._bitmaps:
            while (record := one.next_chunk()) is not None:
                self._write(writer, one, record)
                if budget is not None and writer.position - begin >= budget:
                    return all(other.complete if self._final else not other.left for other in self._bitmaps)
            if self._final and not one.complete:
                self._write(writer, one, BitmapRecord(BitmapFlag.COMPLETE))
                one.complete = True
        return True

    def _write(self, writer: StreamWriter, one: OutgoingBitmap, record: BitmapRecord) -> None:
        """Write a record about this bitmap, without the names if they are those of the previous record."""
        node, bitmap = one.node_alias, one.alias
        node_before, bitmap_before = self._named
        self._named = node, bitmap
        if node != node_before:
            record = replace(record, flags=record.flags | BitmapFlag.NODE_NAME, node=node)
        if (node, bitmap) != (node_before, bitmap_before):
            record = replace(record, flags=record.flags | BitmapFlag.BITMAP_NAME, bitmap=bitmap)
        write_bitmap_record(writer, record)


def _end_body(writer: StreamWriter) -> None:
    write_bitmap_record(writer, BitmapRecord(BitmapFlag.EOS))
