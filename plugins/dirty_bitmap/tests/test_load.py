"""A hostile or broken stream causes a clear error, and leaves no bitmap that looks complete."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from corefw_dirty_bitmap import corefw_settings
from corefw_dirty_bitmap.load import BitmapLoader

from corefw.channel import Interrupt
from corefw.errors import RemoteStreamError
from corefw.machine import BlockMachine
from corefw.settings import Settings
from corefw.testing.recording import KitContext
from corefw.wire.records import BitmapFlag, BitmapRecord, StartFlag, write_bitmap_record
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.helpers.disks import MIB, Disk, DiskMachine, DiskMakingMachine, state_of

EOS = BitmapRecord(BitmapFlag.EOS)
COMPLETE = BitmapRecord(BitmapFlag.COMPLETE)
ZEROES = BitmapFlag.BITS | BitmapFlag.ZEROES


def start(
    node: str = "disk", bitmap: str = "b", granularity: int = 65536, flags: StartFlag = StartFlag.ENABLED
) -> BitmapRecord:
    named = BitmapFlag.START | BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME
    return BitmapRecord(named, node, bitmap, granularity=granularity, start_flags=flags)


def bits(first: int, sectors: int, data: bytes | None = None) -> BitmapRecord:
    return BitmapRecord(ZEROES if data is None else BitmapFlag.BITS, sector=first, sectors=sectors, data=data)


def load(machine: BlockMachine, records: Iterable[BitmapRecord]) -> BitmapLoader:
    settings = Settings([corefw_settings()])
    loader = BitmapLoader(machine, settings)
    loader.setup(KitContext(settings, Interrupt()))
    load_more(loader, records)
    return loader


def load_more(loader: BitmapLoader, records: Iterable[BitmapRecord]) -> None:
    sink = MemorySink()
    writer = StreamWriter(sink)
    for record in records:
        write_bitmap_record(writer, record)
    writer.flush()
    loader.load(StreamReader(MemorySource(bytes(sink.data))), 1)


def named(record: BitmapRecord, bitmap: str, node: str | None = None) -> BitmapRecord:
    flags = BitmapFlag.BITMAP_NAME if node is None else BitmapFlag.BITMAP_NAME | BitmapFlag.NODE_NAME
    return replace(record, flags=record.flags | flags, node=node, bitmap=bitmap)


def word(bit: int) -> bytes:
    return (1 << bit).to_bytes(8, "little").ljust(32, b"\0")


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([bits(0, 8)], "the name of a block node and of its bitmap"),
        ([COMPLETE], "the name of a block node and of its bitmap"),
        ([start("other")], "the name of a block node of this machine"),
        ([start(), start()], "each bitmap once"),
        ([start(), bits(8, 8)], "from the beginning of a word on"),
        ([start(), bits(0, 2 * MIB // 512)], "within its 1048576 bytes"),
        ([start(granularity=512), bits(0, 2048, b"x")], "256 bytes of bits"),
        ([start(granularity=512), bits(0, 64, bytes(64))], "8 bytes of bits, padded to 32"),
        ([start(), COMPLETE], "the bits of bitmap 'b' of block node 'disk' for 1048576 bytes"),
        ([start(granularity=512), bits(0, 64), bits(128, 1920), COMPLETE], "those for 32768"),
        ([start(), bits(0, 2048), COMPLETE, COMPLETE], "a bitmap that has begun and not ended"),
        ([start(), bits(0, 2048), COMPLETE, bits(0, 2048)], "a bitmap that has begun and not ended"),
        ([start(granularity=512), bits(0, 1), bits(0, 1), bits(64, 1984), COMPLETE], "those for 512"),
    ],
)
def test_records_out_of_place_are_refused(records: list[BitmapRecord], error: str) -> None:
    with DiskMachine(Disk("disk", MIB), incoming=True) as machine, pytest.raises(RemoteStreamError, match=error):
        load(machine, records)


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([start(granularity=512), bits(0, 1 << 31)], "at most 10240 bytes of bits in a record"),
        ([start(granularity=512), bits(1 << 41, 64)], "at most 1073741824 bytes of bits"),
        ([start(), bits(0, 8), COMPLETE, start(bitmap="c"), bits(0, 16), COMPLETE], "for 4096 bytes"),
        ([start(), bits(1 << 14, 8), COMPLETE], "those for 0"),
        ([start(node=""), bits(0, 8), COMPLETE], "to be created"),
        ([start(bitmap=""), bits(0, 8), COMPLETE], "name cannot be empty"),
    ],
)
def test_a_parked_machine_allocates_nothing_for_what_did_not_come(records: list[BitmapRecord], error: str) -> None:
    with DiskMakingMachine() as machine, pytest.raises(RemoteStreamError, match=error):
        load(machine, records)


def test_records_that_overlap_take_no_more_memory_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record has eight words, and begins one word after the previous one."""
    monkeypatch.setattr("corefw_dirty_bitmap.load.MAX_BITS", 100)
    again = [bits(0, 512, bytes(64))] * 9
    with DiskMakingMachine() as machine:
        load(machine, [start(granularity=512), *again, EOS])
        with pytest.raises(RemoteStreamError, match="at most 100 bytes of bits in all records, got 128"):
            load(machine, [start(granularity=512), *again, bits(64, 512, bytes(64))])


def test_a_chunk_that_comes_again_replaces_the_first() -> None:
    with DiskMachine(Disk("disk", MIB), incoming=True) as machine:
        load(machine, [start(), bits(0, 2048, word(3)), bits(0, 2048, word(5)), COMPLETE, EOS])
        assert machine.disks[0].bitmap("b").runs().tolist() == [[5 * 65536, 6 * 65536]]


def test_what_the_guest_writes_meanwhile_is_kept() -> None:
    """A bitmap may arrive after the guest has started, as in QEMU. A disabled one records nothing."""
    with DiskMachine(disk := Disk("disk", MIB), incoming=True) as machine:
        loader = load(machine, [start(), start(bitmap="off", flags=StartFlag(0)), EOS])
        assert all(one.busy for one in disk.bitmaps)
        disk.write(0, 1)
        for name in ("b", "off"):
            load_more(loader, [named(bits(0, 2048, word(9)), name), COMPLETE, EOS])
        assert disk.bitmap("b").runs().tolist() == [[0, 65536], [9 * 65536, 10 * 65536]]
        assert disk.bitmap("off").runs().tolist() == [[9 * 65536, 10 * 65536]]
        assert [one.enabled for one in disk.bitmaps] == [False, True]
        assert not any(one.busy for one in disk.bitmaps)


def test_a_bitmap_that_is_not_complete_is_inconsistent_and_removed_if_the_guest_does_not_come() -> None:
    with DiskMachine(disk := Disk("disk", MIB), incoming=True) as machine:
        loader = load(machine, [start(), start(bitmap="c"), bits(0, 2048), COMPLETE, EOS])
        loader.cleanup()
        assert {one.name: one.inconsistent for one in disk.bitmaps} == {"b": True, "c": False}
        loader.abandoned()
        assert not disk.bitmaps


def test_without_the_rest_a_parked_machine_has_inconsistent_bitmaps() -> None:
    """The user has to notice that they are incomplete."""
    with DiskMakingMachine() as machine:
        loader = load(machine, [start(), start(bitmap="c"), bits(0, 2048), COMPLETE, start(bitmap="none"), EOS])
        loader.connection_lost()
        loader.cleanup()
        loader.committed()
        assert {one.name: one.inconsistent for one in machine.nodes[0].bitmaps} == {"b": True, "c": False, "none": True}


# -- after a break: either all bits are right, or the bitmap is inconsistent -------------------------------------------

FIRST, REST = bits(0, 1024, word(3)), bits(1024, 1024, word(5))
"""Both halves of a bitmap with granularity 8 KiB, with one bit set in each."""


def resumed(before: Iterable[BitmapRecord], after: Iterable[BitmapRecord]) -> dict[tuple[str, str], object]:
    """The bitmaps of a parked machine afterwards: where they are dirty, or None for an inconsistent one."""
    with DiskMakingMachine() as machine:
        loader = load(machine, [*before, EOS])
        loader.connection_lost()
        load_more(loader, [*after, EOS])
        loader.cleanup()
        loader.committed()
        return {
            (node.name, one.name): None if one.inconsistent else one.runs().tolist()
            for node in machine.nodes
            for one in node.bitmaps
        }


WHOLE = [[3 * 8192, 4 * 8192], [(64 + 5) * 8192, (64 + 6) * 8192]]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [FIRST, REST, COMPLETE], WHOLE),
        ([FIRST], [REST, COMPLETE], WHOLE),
        ([FIRST, REST], [named(FIRST, "b", "disk"), REST, COMPLETE], WHOLE),
        ([FIRST, REST, COMPLETE], [named(FIRST, "b", "disk"), COMPLETE], WHOLE),
        ([], [REST, COMPLETE], None),
        ([FIRST], [COMPLETE], None),
        ([FIRST], [], None),
    ],
)
def test_a_single_bitmap_goes_on(before: list[BitmapRecord], after: list[BitmapRecord], expected: object) -> None:
    """A QEMU leaves the name out. A parked machine does not know how long the node is, so more may be missing."""
    begun = start(granularity=8192)
    assert resumed([begun, *before], after) == {("disk", "b"): expected}


def test_bits_of_a_bitmap_that_is_not_named_are_dropped() -> None:
    """They may belong to another bitmap than the last one that was named before the break."""
    begun = [start(granularity=8192), start(bitmap="c", granularity=8192), start("other", "b", granularity=8192)]
    before = [named(FIRST, "b", "disk"), REST, named(FIRST, "c")]
    after = [REST, named(FIRST, "b", "other"), REST, named(COMPLETE, "b", "disk"), named(COMPLETE, "c")]
    complete = named(COMPLETE, "b", "other")
    assert resumed([*begun, *before], [*after, complete]) == {
        ("disk", "b"): None,
        ("disk", "c"): None,
        ("other", "b"): WHOLE,
    }


def test_the_length_of_the_disk_shows_that_nothing_is_missing() -> None:
    with DiskMachine(disk := Disk("disk", MIB), incoming=True) as machine:
        loader = load(machine, [start(granularity=8192), FIRST, REST, start(bitmap="c", granularity=8192), FIRST, EOS])
        loader.connection_lost()
        load_more(loader, [named(COMPLETE, "b", "disk"), named(COMPLETE, "c"), EOS])
        assert disk.bitmap("b").runs().tolist() == WHOLE
        assert (disk.bitmap("b").busy, disk.bitmap("c").inconsistent) == (False, True)


def test_an_empty_disk_has_empty_bitmaps() -> None:
    """QEMU sends a record with zero sectors for it."""
    with DiskMakingMachine() as machine:
        load(machine, [start(), bits(0, 0), COMPLETE, EOS])
        assert [(key, state[4]) for key, state in state_of(machine).items()] == [(("disk", "b"), 0)]
