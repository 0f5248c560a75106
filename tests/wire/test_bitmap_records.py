"""The records of the section 'dirty-bitmap': writing, reading, and refusing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.errors import RemoteStreamError
from corefw.inspection import inspect
from corefw.wire import items
from corefw.wire.decoder import decode
from corefw.wire.records import (
    BitmapFlag,
    BitmapRecord,
    StartFlag,
    bits_size,
    chunk_sectors,
    padded_size,
    read_bitmap_record,
    write_bitmap_record,
)
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.golden.record import load

START = BitmapRecord(
    BitmapFlag.START | BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME,
    "disk",
    "b0",
    granularity=65536,
    start_flags=StartFlag.ENABLED | StartFlag.PERSISTENT,
)
GOLDEN = [
    (START, "1c 04 6469736b 02 6230 00010000 03"),
    (BitmapRecord(BitmapFlag.EOS), "01"),
    (BitmapRecord(BitmapFlag.COMPLETE | BitmapFlag.EOS), "21"),
    (
        BitmapRecord(BitmapFlag.BITS, sector=8, sectors=16, data=b"\5"),
        "40 0000000000000008 00000010 0000000000000001 05",
    ),
    (BitmapRecord(BitmapFlag.BITS | BitmapFlag.ZEROES, sectors=1), "42 0000000000000000 00000001"),
    (BitmapRecord(BitmapFlag.COMPLETE | BitmapFlag.BITMAP_NAME, bitmap="x"), "24 01 78"),
    (BitmapRecord(BitmapFlag.EOS, width=2), "8001"),
    (BitmapRecord(BitmapFlag.EOS, width=4), "80800001"),
]


def written(record: BitmapRecord) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_bitmap_record(writer, record)
    writer.flush()
    return bytes(sink.data)


def read(data: bytes) -> BitmapRecord:
    return read_bitmap_record(StreamReader(MemorySource(data)))


@pytest.mark.parametrize(("record", "data"), GOLDEN)
def test_a_record_in_bytes(record: BitmapRecord, data: str) -> None:
    assert written(record).hex() == data.replace(" ", "")
    assert read(bytes.fromhex(data)) == record


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("00", "flags"),
        ("30", "one of START, COMPLETE and BITS"),
        ("02", "one of START, COMPLETE and BITS"),
        ("8101", "known flags"),
        ("80800081", "known flags"),
        ("10 00000100 00", "granularity"),
        ("10 00010001 00", "granularity"),
        ("10 00010000 08", "flags of a bitmap"),
        ("40 0000000000000000 00000001 0000000000002801", "at most 10240 bytes"),
        ("40 0000000000000000 00000001 ffffffffffffffff", "at most 10240 bytes"),
        ("42 ffffffffffffffff 00000001", "sectors below"),
        ("42 003fffffffffffff 00000002", "sectors below"),
        ("08 02 ff ff", "as text"),
        ("1c 04 64", "4 bytes"),
    ],
)
def test_a_record_that_is_wrong_is_refused(data: str, expected: str) -> None:
    with pytest.raises(RemoteStreamError, match=expected):
        read(bytes.fromhex(data))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_record_or_an_error(data: bytes) -> None:
    try:
        record = read(data)
    except RemoteStreamError:
        return
    assert data.startswith(written(record))


def test_sizes_are_those_of_qemu() -> None:
    assert chunk_sectors(65536) == 1048576
    assert [bits_size(sectors, 512) for sectors in (0, 1, 64, 65)] == [0, 8, 8, 16]
    assert bits_size(1, 65536) == 8
    assert [padded_size(size) for size in (0, 8, 32, 40)] == [0, 32, 32, 64]


def test_what_a_real_qemu_sends() -> None:
    """The bits, sizes and chunks in a recording are where these functions say."""
    data = load("pc-bitmaps")
    records = [item for item in decode(StreamReader(MemorySource(data))) if isinstance(item, items.Bitmap)]
    granularity = {one.bitmap: one.record.granularity for one in records if one.record.kind is BitmapFlag.START}
    assert granularity == {"coarse": 65536, "fine": 512, "off": 4096, "empty": 4096}
    total = {"coarse": 19532, "fine": 19532, "off": 19532, "empty": 2048}
    for name, size in granularity.items():
        bits = [one.record for one in records if one.bitmap == name and one.record.kind is BitmapFlag.BITS]
        step = chunk_sectors(size)
        assert [one.sector for one in bits] == list(range(0, total[str(name)], step))
        assert [one.sectors for one in bits] == [
            min(step, total[str(name)] - at) for at in range(0, total[str(name)], step)
        ]
        for one in bits:
            assert one.data is None or len(one.data) == padded_size(bits_size(one.sectors, size))


def test_an_inspection_counts_what_is_dirty() -> None:
    bitmaps = {one.name: one for one in inspect(MemorySource(load("pc-bitmaps"))).bitmaps}
    assert [(one.node, one.name) for one in bitmaps.values()] == [
        ("drive", "empty"),
        ("disk", "off"),
        ("disk", "fine"),
        ("disk", "coarse"),
    ]
    assert (bitmaps["fine"].dirty, bitmaps["coarse"].dirty) == ((128 << 10) + 512, 3 * 65536)
    assert (bitmaps["off"].dirty, bitmaps["empty"].dirty) == (0, 0)
    assert [one.enabled for one in bitmaps.values()] == [True, False, True, True]
    assert all(one.complete for one in bitmaps.values())
