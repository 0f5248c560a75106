"""MemfdBlock: bytes arrive where they belong, and untouched pages stay unallocated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from corefw.errors import MachineError
from corefw.memory.blocks import MemfdBlock, NeverDirty

PAGE = 4096
PAGES = 64


@pytest.fixture
def block() -> Iterator[MemfdBlock]:
    block = MemfdBlock("ram", PAGES * PAGE)
    yield block
    block.close()


def allocated(block: MemfdBlock) -> int:
    """Number of pages that the kernel has allocated."""
    return os.fstat(block.fd).st_blocks * 512 // PAGE


def received(count: int, stride: int = PAGE + 8, seed: int = 1) -> NDArray[np.uint8]:
    """Pages as in a receive buffer: each after a record's header of 8 bytes."""
    buffer = np.frombuffer(np.random.default_rng(seed).bytes(count * stride), dtype=np.uint8)
    return buffer.reshape(count, stride)[:, stride - PAGE :]


def test_view_pages_and_descriptor_are_the_same_memory(block: MemfdBlock) -> None:
    block.view[PAGE : PAGE + 3] = b"abc"
    assert bytes(block.pages[1, :3]) == b"abc"
    assert os.pread(block.fd, 3, PAGE) == b"abc"


@settings(max_examples=60)
@given(
    pages=st.lists(st.integers(0, PAGES - 1), unique=True, max_size=PAGES),
    ascending=st.booleans(),
    stride=st.sampled_from([PAGE, PAGE + 8]),
)
def test_store_puts_every_row_where_it_belongs(pages: list[int], ascending: bool, stride: int) -> None:
    block = MemfdBlock("ram", PAGES * PAGE)
    try:
        numbers = np.array(sorted(pages) if ascending else pages, dtype=np.int64)
        data = received(len(pages), stride)
        block.store(numbers, data)
        expected = np.zeros((PAGES, PAGE), dtype=np.uint8)
        expected[numbers] = data
        assert np.array_equal(block.pages, expected)
    finally:
        block.close()


@pytest.mark.parametrize("pages", [range(10, 30), range(0, 60, 3)], ids=["one run", "scattered"])
def test_store_overwrites(block: MemfdBlock, pages: range) -> None:
    block.pages[:] = 7
    data = received(len(pages))
    block.store(np.array(pages), data)
    assert np.array_equal(block.pages[pages.start : pages.stop : pages.step], data)
    assert int((block.pages == 7).all(axis=1).sum()) == PAGES - len(pages)


def test_more_pages_than_one_call_takes() -> None:
    block = MemfdBlock("ram", 3000 * PAGE)
    try:
        data = received(2500)
        block.store(np.arange(100, 2600), data)
        assert np.array_equal(block.pages[100:2600], data)
        assert not block.pages[2600:].any()
    finally:
        block.close()


def test_fresh_block_is_one_hole(block: MemfdBlock) -> None:
    assert block.holes().tolist() == [[0, PAGES]]
    assert allocated(block) == 0


def test_holes_are_what_nobody_touched(block: MemfdBlock) -> None:
    block.store(np.arange(8, 16), received(8))
    block.view[40 * PAGE] = 1
    assert block.holes().tolist() == [[0, 8], [16, 40], [41, PAGES]]
    block.pages[:] = 1
    assert block.holes().shape == (0, 2)


def test_zeroes_do_not_touch_what_was_not_touched(block: MemfdBlock) -> None:
    block.fill(np.arange(PAGES), 0)
    assert allocated(block) == 0
    block.pages[10:20] = 5
    block.fill(np.arange(15, PAGES), 0)
    assert allocated(block) == 10
    assert block.pages[10:15].all() and not block.pages[15:20].any()


def test_whole_huge_pages_that_become_zero_are_given_back() -> None:
    block = MemfdBlock("ram", 8 << 20)
    try:
        block.pages[:] = 7
        block.fill(np.arange(3, 2000), 0)
        assert block.holes().tolist() == [[512, 1536]]
        assert block.pages[:3].all() and not block.pages[3:2000].any() and block.pages[2000:].all()
    finally:
        block.close()


@settings(max_examples=60)
@given(
    written=st.sets(st.integers(0, PAGES - 1)),
    zeroed=st.lists(st.integers(0, PAGES - 1), unique=True, max_size=PAGES),
)
def test_zeroes_reach_every_touched_page_whoever_touched_it(written: set[int], zeroed: list[int]) -> None:
    block = MemfdBlock("ram", PAGES * PAGE)
    try:
        for page in written:
            os.pwrite(block.fd, b"x", page * PAGE)
        block.fill(np.array(zeroed, dtype=np.int64), 0)
        assert allocated(block) == len(written)
        for page in written:
            assert os.pread(block.fd, 1, page * PAGE) == (b"\0" if page in zeroed else b"x")
    finally:
        block.close()


@pytest.mark.parametrize("pages", [range(10, 30), range(0, 60, 3)], ids=["one run", "scattered"])
def test_fill_with_a_byte(block: MemfdBlock, pages: range) -> None:
    block.fill(np.array(pages), 0xAB)
    assert (block.pages[pages.start : pages.stop : pages.step] == 0xAB).all()
    assert int((block.pages == 0xAB).sum()) == len(pages) * PAGE


@pytest.mark.parametrize("pages", [[-1], [PAGES], [0, PAGES + 5]])
def test_pages_outside_are_a_bug(block: MemfdBlock, pages: list[int]) -> None:
    with pytest.raises(IndexError):
        block.store(np.array(pages), received(len(pages)))
    with pytest.raises(IndexError):
        block.fill(np.array(pages), 0)


def test_its_size_cannot_change(block: MemfdBlock) -> None:
    for length in (PAGE, 2 * PAGES * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(block.fd, length)


def test_from_a_descriptor(block: MemfdBlock) -> None:
    block.view[0] = 9
    other = MemfdBlock.from_fd("again", os.dup(block.fd))
    assert other.length == block.length
    assert other.view[0] == 9
    other.view[1] = 8
    other.close()
    assert block.view[1] == 8


def test_a_name_as_long_as_the_stream_allows() -> None:
    block = MemfdBlock("ä" * 127, PAGE)
    assert block.idstr == "ä" * 127
    block.close()


def test_too_much_memory_says_which_block_and_how_much() -> None:
    with pytest.raises(MachineError, match=r"RAM block 'huge' of 8388608\.0 TiB"):
        MemfdBlock("huge", (1 << 63) - PAGE)


@pytest.mark.parametrize("length", [0, -PAGE, PAGE + 1])
def test_a_length_that_is_no_multiple_of_the_page_size(length: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        MemfdBlock("odd", length)


def test_close_twice_and_with_an_array_left(block: MemfdBlock) -> None:
    array = block.pages[3:5]
    fd = block.fd
    block.close()
    block.close()
    assert not Path(f"/proc/self/fd/{fd}").exists()
    array[:] = 3


def test_nothing_is_ever_dirty_in_a_parked_block(block: MemfdBlock) -> None:
    log = block.dirty_log
    assert isinstance(log, NeverDirty)
    log.start()
    block.view[0] = 1
    assert log.harvest().shape == (0, 2)
    log.stop()
    log.stop()


def test_memory_that_is_given_back_is_zero(block: MemfdBlock) -> None:
    block.pages[:] = 7
    block.release(np.array([[0, 8], [20, 21]]))
    assert allocated(block) == PAGES - 9
    assert not block.pages[0:8].any() and not block.pages[20].any()
    assert (block.pages[8:20] == 7).all() and (block.pages[21:] == 7).all()
