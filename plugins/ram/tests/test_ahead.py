"""Allocating ahead of the receiver: only behind solid data, without a trace in the contents, and never a must."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from corefw_ram.ahead import AHEAD, SOLID, Forerunner
from numpy.typing import NDArray

from corefw.errors import MachineError
from corefw.machine import RamBlock
from corefw.memory.blocks import MemfdBlock
from corefw.memory.runs import Runs
from corefw.testing.tasks import wait_until
from tests.helpers.ram import PAGE, StillMachine, allocated, block, fill_record, load, page_record

PAGES = SOLID + 3 * AHEAD
SLACK = 1024
"""Pages: what was written last, and huge pages of the host."""


@pytest.fixture
def ram() -> Iterator[MemfdBlock]:
    made = block("ram", PAGES)
    yield made
    made.close()


@pytest.fixture
def forerunner() -> Iterator[Forerunner]:
    threads = set(threading.enumerate())
    made = Forerunner()
    yield made
    made.close()
    made.close()
    assert set(threading.enumerate()) <= threads


def wrote_all(forerunner: Forerunner, ram: RamBlock, first: int, end: int, step: int = 200) -> None:
    for at in range(first, end, step):
        forerunner.wrote(ram, at, min(at + step, end), solid=True)


def test_pages_are_allocated_behind_solid_data(forerunner: Forerunner, ram: MemfdBlock) -> None:
    wrote_all(forerunner, ram, 0, SOLID + 100)
    assert wait_until(lambda: allocated(ram) > 0)
    forerunner.close()
    assert 0 < allocated(ram) <= AHEAD + SLACK
    assert ram.holes().tolist() == [[0, PAGES]], "what is allocated counts as never touched until it is written"


def test_it_runs_ahead_up_to_the_block_s_end(forerunner: Forerunner, ram: MemfdBlock) -> None:
    """Whatever is written, it stays at most AHEAD pages in front, and ends where the block does."""
    wrote_all(forerunner, ram, 0, PAGES)
    assert wait_until(lambda: allocated(ram) >= AHEAD // 2)
    forerunner.close()
    assert allocated(ram) <= PAGES - SOLID + SLACK
    assert os.fstat(ram.fd).st_size == PAGES * PAGE


@pytest.mark.parametrize("gap", ["too few", "zero pages in between", "another block", "a jump", "backwards"])
def test_nothing_is_allocated_where_the_data_has_gaps(forerunner: Forerunner, ram: MemfdBlock, gap: str) -> None:
    half = SOLID // 2
    with StillMachine(block("other", SOLID)) as machine:
        wrote_all(forerunner, ram, 0, half)
        match gap:
            case "zero pages in between":
                forerunner.wrote(ram, half, half + 200, solid=False)
                wrote_all(forerunner, ram, half + 200, SOLID)
            case "another block":
                wrote_all(forerunner, machine.blocks[0], 0, half)
                wrote_all(forerunner, ram, half, SOLID)
            case "a jump":
                wrote_all(forerunner, ram, half + 300, SOLID + 100)
            case "backwards":
                wrote_all(forerunner, ram, 0, half)
        forerunner.close()
        assert (allocated(ram), allocated(machine.blocks[0])) == (0, 0)


def test_contents_are_never_changed(forerunner: Forerunner, ram: MemfdBlock) -> None:
    ram.pages[:] = 0x77
    before = allocated(ram)
    wrote_all(forerunner, ram, 0, SOLID + AHEAD)
    wait_until(lambda: False, seconds=0.1)
    forerunner.close()
    assert (ram.pages == 0x77).all()
    assert allocated(ram) == before


def test_close_ends_it_in_the_middle(forerunner: Forerunner, ram: MemfdBlock) -> None:
    wrote_all(forerunner, ram, 0, SOLID + AHEAD)
    forerunner.close()
    held = allocated(ram)
    wait_until(lambda: False, seconds=0.05)
    assert allocated(ram) == held <= 2 * AHEAD


class NoMemoryLeft(MemfdBlock):
    """The host says so after a while."""

    def __init__(self, pages: int, error: int) -> None:
        super().__init__("ram", pages * PAGE)
        self.asked = 0
        self._error = error

    def preallocate(self, first: int, end: int) -> None:
        self.asked += 1
        if self.asked > 2:
            raise MachineError(f"cannot allocate RAM block 'ram': {os.strerror(self._error)}")
        super().preallocate(first, end)


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOSPC], ids=os.strerror)
def test_a_host_without_memory_does_not_matter(forerunner: Forerunner, error: int) -> None:
    """The writer meets it by itself, if it is still so then."""
    ram = NoMemoryLeft(PAGES, error)
    try:
        wrote_all(forerunner, ram, 0, SOLID + 100)
        assert wait_until(lambda: ram.asked > 2)
        wrote_all(forerunner, ram, SOLID + 100, PAGES)
        forerunner.close()
        assert ram.asked == 3
    finally:
        ram.close()


class Plain(RamBlock):
    """A block of another kind, whose memory cannot be had before it is written."""

    def __init__(self, inner: MemfdBlock) -> None:
        self.idstr, self.length, self.page_size = inner.idstr, inner.length, inner.page_size
        self._inner = inner

    def holes(self) -> Runs:
        return self._inner.holes()

    def store(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self._inner.store(pages, data)

    def fill(self, pages: NDArray[np.int64], value: int) -> None:
        self._inner.fill(pages, value)


def test_a_block_that_cannot_is_left_alone(forerunner: Forerunner, ram: MemfdBlock) -> None:
    wrote_all(forerunner, Plain(ram), 0, PAGES)
    forerunner.close()
    assert allocated(ram) == 0


def test_a_loader_uses_it_and_ends_it() -> None:
    """40 MiB of solid pages, as they come over a channel; then zero pages up to the end of the block."""
    solid = SOLID + 2048
    page = bytes([5]) * PAGE
    records = [page_record(0, page, "ram"), *(page_record(number, page) for number in range(1, solid))]
    zeros = [fill_record(number) for number in range(solid, 2 * PAGES)]
    threads = set(threading.enumerate())
    with StillMachine(block("ram", 2 * PAGES)) as machine:
        load(machine, b"".join([*records, *zeros]) + (0x10).to_bytes(8, "big"))
        (ram,) = machine.blocks
        assert set(threading.enumerate()) <= threads
        assert solid <= allocated(ram) <= solid + AHEAD + SLACK
        assert np.array_equal(np.flatnonzero(ram.pages[:, 9]), np.arange(solid))
