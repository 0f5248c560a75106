"""Dirty bitmaps have what was written, in every form in which they can be read.

The model of a bitmap is a set of granules.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.block import BlockNode, ByteRuns, DirtyBitmap, no_byte_runs
from corefw.errors import StateError, UsageError

LENGTH = 300 * 512
GRANULARITIES = st.sampled_from([512, 1024, 4096, 65536, 1 << 20])
WRITES = st.lists(st.tuples(st.integers(0, LENGTH + 1000), st.integers(1, 9000)), max_size=20)


class Disk(BlockNode):
    """A node whose guest writes when the test says so."""

    def __init__(self, name: str = "disk", length: int = LENGTH) -> None:
        super().__init__(name, length)
        self.written: list[tuple[int, int]] = []

    def collect(self) -> ByteRuns:
        written, self.written = self.written, []
        return runs(written) if written else no_byte_runs()

    def write(self, offset: int, length: int) -> None:
        self.written.append((offset, offset + length))


def runs(pairs: list[tuple[int, int]]) -> ByteRuns:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def granules(writes: list[tuple[int, int]], granularity: int) -> set[int]:
    return {
        granule
        for offset, length in writes
        for granule in range(offset // granularity, -(-min(offset + length, LENGTH) // granularity))
        if offset < LENGTH
    }


def marked(bitmap: DirtyBitmap) -> set[int]:
    """The granules in runs(), which have to be ascending."""
    found = bitmap.runs()
    assert (found[1:, 0] >= found[:-1, 1]).all()
    assert (found[:, 0] < found[:, 1]).all()
    size = bitmap.granularity
    return {granule for first, end in found.tolist() for granule in range(first // size, -(-end // size))}


def bits(found: set[int], bitmap: DirtyBitmap) -> bytes:
    number = sum(1 << granule for granule in found)
    return number.to_bytes(max(1, -(-bitmap.size // 64)) * 8, "little")


@given(WRITES, GRANULARITIES)
def test_what_was_written_is_dirty_and_nothing_else(writes: list[tuple[int, int]], granularity: int) -> None:
    disk = Disk()
    bitmap = disk.add_bitmap("one", granularity)
    for write in writes:
        disk.write(*write)
    expected = granules(writes, granularity)
    assert bitmap.count() == len(expected) * granularity
    assert marked(bitmap) == expected
    whole = bits(expected, bitmap)
    assert bitmap.sha256() == hashlib.sha256(whole).hexdigest()
    assert bitmap.serialize(0, LENGTH) == whole


@given(WRITES, WRITES, st.sampled_from([512, 1024]))
def test_bits_that_arrive_in_chunks_are_merged_with_what_is_written(
    there: list[tuple[int, int]], here: list[tuple[int, int]], granularity: int
) -> None:
    source, destination = Disk(), Disk()
    sent = source.add_bitmap("one", granularity)
    sent.mark(runs([(offset, offset + length) for offset, length in there]))
    arriving = destination.add_bitmap("one", granularity, busy=True)
    for write in here:
        destination.write(*write)
    for offset in range(0, LENGTH, sent.alignment):
        length = min(sent.alignment, LENGTH - offset)
        chunk = sent.serialize(offset, length)
        assert len(chunk) == sent.serialized_size(offset, length)
        arriving.merge_bits(offset, length, chunk)
    assert marked(arriving) == granules(there + here, granularity)


@given(WRITES, WRITES, GRANULARITIES, GRANULARITIES)
def test_a_merge_takes_in_bitmaps_of_other_nodes_and_granularities(
    one: list[tuple[int, int]], other: list[tuple[int, int]], granularity: int, finer_or_coarser: int
) -> None:
    disk, elsewhere = Disk(), Disk("elsewhere")
    target = disk.add_bitmap("target", granularity)
    source = elsewhere.add_bitmap("source", finer_or_coarser)
    for write in one:
        disk.write(*write)
    for write in other:
        elsewhere.write(*write)
    target.merge([source])
    touched = [
        (granule * finer_or_coarser, min(finer_or_coarser, LENGTH - granule * finer_or_coarser))
        for granule in granules(other, finer_or_coarser)
    ]
    assert marked(target) == granules(one + touched, granularity)
    assert marked(source) == granules(other, finer_or_coarser)


def test_every_operation_comes_after_the_writes_before_it() -> None:
    disk = Disk()
    disk.write(0, 1)
    early = disk.add_bitmap("early", 512)
    off = disk.add_bitmap("off", 512, enabled=False)
    disk.write(512, 1)
    late = disk.add_bitmap("late", 512)
    off.enable()
    disk.write(1024, 1)
    early.disable()
    disk.write(1536, 1)
    late.clear()
    disk.write(2048, 1)
    assert (marked(early), marked(off), marked(late)) == ({1, 2}, {2, 3, 4}, {4})
    assert [bitmap.name for bitmap in disk.bitmaps] == ["late", "off", "early"]


def test_what_is_written_during_an_operation_comes_after_it() -> None:
    disk = Disk()
    bitmap = disk.add_bitmap("one", 512)
    disk.write(0, 1)
    with disk.settled():
        disk.write(512, 1)
        assert marked(bitmap) == {0}
        bitmap.clear()
    assert marked(bitmap) == {1}


def test_bits_beyond_the_end_are_dropped() -> None:
    disk = Disk(length=512 * 3)
    bitmap = disk.add_bitmap("one", 512)
    bitmap.merge_bits(0, 512 * 3, b"\xff" * 8)
    assert bitmap.count() == 512 * 3
    assert bitmap.runs().tolist() == [[0, 512 * 3]]
    empty = Disk(length=0).add_bitmap("one", 65536)
    assert (empty.count(), empty.sha256()) == (0, hashlib.sha256(bytes(8)).hexdigest())


@pytest.mark.parametrize(
    ("offset", "length", "reason"),
    [
        (0, 0, "range"),
        (-512, 512, "range"),
        (0, LENGTH + 512, "range"),
        (512, LENGTH - 512, "aligned"),
        (0, 512, "aligned"),
    ],
)
def test_a_wrong_range_is_refused(offset: int, length: int, reason: str) -> None:
    bitmap = Disk().add_bitmap("one", 512)
    for use in (bitmap.serialized_size, bitmap.serialize):
        with pytest.raises(ValueError, match=reason):
            use(offset, length)
    with pytest.raises(ValueError, match=reason):
        bitmap.merge_bits(offset, length, b"")


def test_data_of_another_size_is_refused() -> None:
    bitmap = Disk().add_bitmap("one", 512)
    with pytest.raises(ValueError, match="7 bytes of bits for a range that takes 8"):
        bitmap.merge_bits(0, 64 * 512, bytes(7))


def test_states() -> None:
    disk = Disk()
    bitmap = disk.add_bitmap("one", 512, busy=True)
    with pytest.raises(StateError, match="Bitmap 'one' is currently in use by another operation and cannot be used"):
        bitmap.check()
    disk.write(0, 1)
    assert bitmap.count() == 512, "a busy bitmap goes on recording"
    bitmap.set_busy(False)
    bitmap.check()
    bitmap.mark_inconsistent()
    bitmap.enable()
    disk.write(512, 1)
    assert (bitmap.inconsistent, bitmap.enabled, bitmap.busy, bitmap.count()) == (True, False, False, 512)
    bitmap.check_idle()
    with pytest.raises(StateError, match="Bitmap 'one' is inconsistent and cannot be used"):
        bitmap.check()
    disk.remove_bitmap(bitmap)
    assert disk.find_bitmap("one") is None


def test_a_merge_that_fails_changes_nothing() -> None:
    disk = Disk()
    target, good, busy = (
        disk.add_bitmap("target", 65536),
        disk.add_bitmap("good", 65536),
        disk.add_bitmap("busy", 65536, busy=True),
    )
    other = Disk("other", 512).add_bitmap("other", 65536)
    good.mark(runs([(0, 1)]))
    with pytest.raises(StateError, match="in use"):
        target.merge([good, busy])
    with pytest.raises(StateError, match="different sizes"):
        target.merge([good, other])
    assert target.count() == 0


@pytest.mark.parametrize("granularity", [0, 256, 513, 1 << 32])
def test_a_wrong_granularity_is_refused(granularity: int) -> None:
    with pytest.raises(UsageError, match="Granularity must be power of 2 and at least 512"):
        Disk().add_bitmap("one", granularity)


def test_a_bitmap_too_large_for_the_host_is_refused() -> None:
    disk = Disk(length=1 << 62)
    with pytest.raises(UsageError, match=r"no memory for the bits of 'one', one for each 512 of .*larger granularity"):
        disk.add_bitmap("one", 512)
    assert disk.bitmaps == ()


def test_wrong_names_are_refused() -> None:
    disk = Disk()
    disk.add_bitmap("one", 65536)
    for name, reason in (
        ("", "empty"),
        ("x" * 1024, "Bitmap name too long: xx"),
        ("one", "Bitmap already exists: one"),
    ):
        with pytest.raises(UsageError, match=reason):
            disk.add_bitmap(name, 65536)
    with pytest.raises(UsageError, match="Dirty bitmap 'two' not found"):
        disk.bitmap("two")


def test_threads_lose_no_write() -> None:
    disk = Disk(length=512 * 4000)
    bitmap = disk.add_bitmap("one", 512)

    def mark(start: int) -> None:
        for sector in range(start, 4000, 4):
            bitmap.mark(runs([(sector * 512, sector * 512 + 1)]))

    threads = [threading.Thread(target=mark, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bitmap.count() == 512 * 4000
