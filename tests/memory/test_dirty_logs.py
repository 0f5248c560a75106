"""Each dirty log, forced, finds every write to another mapping of the block, and nothing else."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from corefw.errors import MachineError, UsageError
from corefw.machine import ComparingLog, DirtyLog
from corefw.memory import logs, pagemap, userfault
from corefw.memory.blocks import MemfdBlock
from corefw.memory.hashes import HashLog
from corefw.memory.logs import LogKind, best_dirty_log, wanted_log
from corefw.memory.pagemap import PagemapLog, Tracker, open_tracker
from corefw.memory.runs import no_runs
from tests.helpers.pages import pages_of

PAGE = 4096
PAGES = 512

needs_pagemap = pytest.mark.skipif(pagemap.unsupported() is not None, reason=f"PAGEMAP_SCAN: {pagemap.unsupported()}")
KINDS = [pytest.param(LogKind.PAGEMAP, marks=needs_pagemap), LogKind.HASHES]


@dataclass
class Guest:
    """A block and the mapping of it that a guest would have."""

    block: MemfdBlock
    pages: NDArray[np.uint8]
    log: DirtyLog

    def harvest(self) -> list[int]:
        return pages_of(self.log.harvest())


@pytest.fixture(params=KINDS)
def guest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    monkeypatch.setenv(logs.VARIABLE, request.param)
    block = MemfdBlock("ram", PAGES * PAGE)
    pages = np.frombuffer(mmap.mmap(block.fd, block.length), dtype=np.uint8).reshape(-1, PAGE)
    tracker = open_tracker() if request.param == LogKind.PAGEMAP else None
    block.dirty_log = best_dirty_log(block, tracker, pages.ctypes.data)
    assert isinstance(block.dirty_log, PagemapLog if tracker else HashLog)
    yield Guest(block, pages, block.dirty_log)
    block.close()
    if tracker:
        tracker.close()


def test_writes_are_found_once(guest: Guest) -> None:
    guest.pages[:100] = 1
    guest.log.start()
    assert guest.harvest() == []
    guest.pages[[7, 100, 101, 102, PAGES - 1], 3] += 1
    assert guest.log.harvest().tolist() == [[7, 8], [100, 103], [PAGES - 1, PAGES]]
    assert guest.harvest() == []
    guest.pages[7, 4095] = 9
    assert guest.harvest() == [7]


def test_pages_that_were_never_touched(guest: Guest) -> None:
    guest.log.start()
    guest.pages[300, 0] = 1
    assert guest.harvest() == [300]
    assert guest.block.holes().tolist() == [[0, 300], [301, PAGES]]


def test_everything_dirty_and_every_other_page(guest: Guest) -> None:
    guest.log.start()
    guest.pages[:] = 1
    assert guest.log.harvest().tolist() == [[0, PAGES]]
    guest.pages[::2] += 1
    assert guest.harvest() == list(range(0, PAGES, 2))


def test_only_some_pages_can_be_looked_at(guest: Guest) -> None:
    guest.pages[:200] = 1
    guest.log.start()
    guest.pages[[7, 50, 60, 300], 3] += 1
    found = set(pages_of(guest.log.harvest_within(np.array([[50, 55], [290, 310]]))))
    assert {50, 300} <= found <= {7, 50, 60, 300}
    assert set(guest.harvest()) == {7, 50, 60, 300} - found, "what was not reported is in the next harvest"
    assert len(guest.log.harvest_within(no_runs())) == 0


def test_writes_by_the_kernel_into_the_guests_mapping(guest: Guest) -> None:
    guest.log.start()
    fd = os.memfd_create("source")
    try:
        os.write(fd, b"x" * (2 * PAGE))
        os.preadv(fd, [guest.pages[20:22].reshape(-1).data], 0)
    finally:
        os.close(fd)
    assert guest.harvest() == [20, 21]


def test_stop_and_start_again(guest: Guest) -> None:
    guest.log.start()
    guest.pages[5] = 1
    guest.log.stop()
    guest.log.stop()
    guest.pages[6] = 1
    assert guest.harvest() == []
    guest.log.start()
    guest.pages[7] = 1
    assert guest.harvest() == [7]


def test_no_write_is_lost_between_harvests_under_load(guest: Guest) -> None:
    """Counters only grow, so the pages copied after each harvest have to be correct in the end."""
    counters = guest.pages.view(np.uint64)[:, 0]
    copy = np.zeros((PAGES, PAGE), dtype=np.uint8)
    done = threading.Event()

    def write() -> None:
        rng = np.random.default_rng(4)
        for _ in range(400):
            counters[np.unique(rng.integers(0, PAGES, 20))] += np.uint64(1)
        done.set()

    guest.log.start()
    copy[:] = guest.block.pages
    writer = threading.Thread(target=write)
    writer.start()
    rounds = 0
    while not done.is_set() or rounds < 3:
        dirty = guest.harvest()
        copy[dirty] = guest.block.pages[dirty]
        rounds += 1
    writer.join()
    dirty = guest.harvest()
    copy[dirty] = guest.block.pages[dirty]
    assert np.array_equal(copy, guest.pages)


@needs_pagemap
@pytest.mark.parametrize("regions", [1, 2, 7])
def test_pagemap_goes_on_where_its_buffer_was_full(monkeypatch: pytest.MonkeyPatch, regions: int) -> None:
    monkeypatch.setattr(pagemap, "REGIONS", regions)
    _scattered(lambda first: list(range(first, PAGES, 3)))


@needs_pagemap
@pytest.mark.parametrize("count", [511, 512, 513, 1024, 1025, 1676])
def test_pagemap_finds_what_is_written_between_its_calls(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """More regions than the kernel gathers at once take several calls. A guest that writes in between, before and after
    the current place, loses no write, and no page is reported that it did not write."""
    pages = 4 * count
    block = MemfdBlock("ram", pages * PAGE)
    guest = np.frombuffer(mmap.mmap(block.fd, block.length), dtype=np.uint8).reshape(-1, PAGE)
    tracker = open_tracker()
    log = PagemapLog(tracker, guest.ctypes.data, block.length)
    rng = np.random.default_rng(count)
    late: set[int] = set()

    def scan(*arguments: Any) -> Any:
        found = fcntl.ioctl(*arguments)
        some = set((2 * rng.integers(0, pages // 2, 20) + 1).tolist())
        guest[sorted(some), 0] += 1
        late.update(some)
        return found

    try:
        log.start()
        monkeypatch.setattr(pagemap, "fcntl", SimpleNamespace(ioctl=scan))
        early = set(range(0, pages, 4))
        guest[sorted(early), 0] += 1
        found = set(pages_of(log.harvest()))
        monkeypatch.undo()
        left = set(pages_of(log.harvest()))
        assert early <= found <= early | late
        assert found | left == early | late
        assert log.harvest().tolist() == []
    finally:
        log.stop()
        tracker.close()
        block.close()


def _scattered(pattern: Callable[[int], list[int]]) -> None:
    block = MemfdBlock("ram", PAGES * PAGE)
    pages = np.frombuffer(mmap.mmap(block.fd, block.length), dtype=np.uint8).reshape(-1, PAGE)
    tracker = open_tracker()
    log = PagemapLog(tracker, pages.ctypes.data, block.length)
    try:
        log.start()
        for first in range(3):
            pages[pattern(first), 1] += 1
            runs = log.harvest()
            assert pages_of(runs) == pattern(first)
            assert (runs[1:, 0] > runs[:-1, 1]).all()
    finally:
        log.stop()
        tracker.close()
        block.close()


@needs_pagemap
def test_pagemap_with_a_guest_page_of_several_host_pages() -> None:
    block = MemfdBlock("ram", PAGES * PAGE, 4 * PAGE)
    pages = np.frombuffer(mmap.mmap(block.fd, block.length), dtype=np.uint8).reshape(-1, PAGE)
    tracker = open_tracker()
    log = PagemapLog(tracker, pages.ctypes.data, block.length, block.page_size)
    try:
        log.start()
        pages[[3, 4, 20], 0] = 1
        assert log.harvest().tolist() == [[0, 2], [5, 6]]
    finally:
        log.stop()
        tracker.close()
        block.close()


def test_hashes_do_not_allocate_what_was_never_touched() -> None:
    block = MemfdBlock("ram", PAGES * PAGE)
    log = HashLog(block)
    try:
        block.pages[9] = 1
        log.start()
        log.harvest()
        assert os.fstat(block.fd).st_blocks * 512 == PAGE
    finally:
        block.close()


def test_hashes_see_a_page_that_was_sent_and_changed_back() -> None:
    block = MemfdBlock("ram", PAGES * PAGE)
    log = HashLog(block)
    assert isinstance(log, ComparingLog)
    try:
        block.pages[:10] = 1
        log.start()
        block.pages[3:6] = 2
        rows = np.zeros((3, PAGE + 8), dtype=np.uint8)
        rows[:, 8:] = block.pages[3:6]
        log.sent(np.arange(3, 6), rows[:, 8:])
        block.pages[3:5] = 1
        assert log.harvest().tolist() == [[3, 5]]
        assert log.harvest().tolist() == []
    finally:
        block.close()


def test_hashes_see_a_hole_that_was_punched() -> None:
    block = MemfdBlock("ram", PAGES * PAGE)
    log = HashLog(block)
    try:
        block.pages[:3] = 1
        log.start()
        block.pages[1] = 0
        assert log.harvest().tolist() == [[1, 2]]
    finally:
        block.close()


def test_a_log_that_is_forced_and_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    block = MemfdBlock("ram", PAGE)
    monkeypatch.setenv(logs.VARIABLE, "pagemap")
    with pytest.raises(UsageError, match="MIGFW_DIRTY_LOG=pagemap, but this host cannot: Linux is too old"):
        best_dirty_log(block, None, 0, "Linux is too old")
    monkeypatch.setenv(logs.VARIABLE, "auto")
    assert isinstance(best_dirty_log(block, None, 0, "Linux is too old"), HashLog)
    block.close()


def test_a_log_that_is_none() -> None:
    assert wanted_log({}) is None
    with pytest.raises(
        UsageError, match="MIGFW_DIRTY_LOG='soft' is not a dirty log: expected one of pagemap, hashes, auto"
    ):
        wanted_log({logs.VARIABLE: "soft"})


def test_a_processor_whose_system_call_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfault, "SYSCALL", {})
    assert "not known here" in str(pagemap.unsupported())


@needs_pagemap
def test_a_range_that_cannot_be_watched() -> None:
    tracker = open_tracker()
    log = PagemapLog(tracker, PAGE, PAGE)
    try:
        with pytest.raises(MachineError, match="cannot watch the guest's memory"):
            log.start()
        log.stop()
    finally:
        tracker.close()


def test_tracker_is_a_pair_of_descriptors() -> None:
    assert Tracker(3, 4).pagemap == 4
