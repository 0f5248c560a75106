"""Files of huge pages have the requested size, or a memfd replaces them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from corefw.memory import hugefile, pagemap
from corefw.memory.blocks import MemfdBlock

LENGTH = hugefile.WORTHWHILE
PAGE = 4096
PAGES = LENGTH // PAGE


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Let every test find out anew whether huge pages are available."""
    hugefile._mount_once.cache_clear()
    yield
    hugefile._mount_once.cache_clear()


def huge() -> int:
    """A descriptor of a file of huge pages; skips the test if there are none."""
    fd = hugefile.create(LENGTH)
    if fd is None:
        pytest.skip("this host gives no huge pages to this user")
    return fd


def test_a_file_has_the_length_zeros_and_huge_pages() -> None:
    fd = huge()
    try:
        assert os.fstat(fd).st_size == LENGTH
        assert not os.get_inheritable(fd)
        with mmap.mmap(fd, LENGTH) as mapping:
            assert mapping[:PAGE] == bytes(PAGE)
            mapping[0] = 1
            assert os.pread(fd, 1, 0) == b"\1"
            assert "ShmemPmdMapped:     2048 kB" in Path("/proc/self/smaps").read_text()
    finally:
        os.close(fd)


def test_an_ordinary_user_gets_it_from_the_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who may not mount asks a helper process in a user namespace."""

    def refuse() -> int:
        raise PermissionError(errno.EPERM, "")

    monkeypatch.setattr(hugefile, "mount", refuse)
    monkeypatch.setattr(hugefile, "HELPER_SECONDS", 60)
    fd = huge()
    assert os.fstat(fd).st_size == LENGTH
    os.close(fd)


def test_small_ones_are_not_worth_it() -> None:
    assert hugefile.create(LENGTH - PAGE) is None


def test_a_word_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hugefile.VARIABLE, "off")
    assert hugefile.create(LENGTH) is None
    block = MemfdBlock("ram", LENGTH)
    assert fcntl.fcntl(block.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    block.close()


def test_an_administrator_switches_them_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    switch = tmp_path / "enabled"
    monkeypatch.setattr(hugefile, "SWITCH", switch)
    assert hugefile.switched_off({}), "a kernel without them"
    switch.write_text("always madvise [never]\n")
    assert hugefile.switched_off({})
    switch.write_text("always [madvise] never\n")
    assert not hugefile.switched_off({})


@pytest.mark.skipif(pagemap.unsupported() is not None, reason="needs PAGEMAP_SCAN (Linux 6.7)")
def test_the_dirty_log_sees_single_small_pages_in_huge_ones() -> None:
    os.close(huge())
    tracker = pagemap.open_tracker()
    block = MemfdBlock("ram", LENGTH)
    log = pagemap.PagemapLog(tracker, block.pages.ctypes.data, LENGTH)
    try:
        block.pages[:, 0] = 1
        log.start()
        assert len(log.harvest()) == 0
        for pages in ([0], [5, 6, 700, PAGES - 1], [6], []):
            assert int(block.pages[:, 1].sum()) == 0, "reading leaves no trace"
            block.pages[pages, 0] += 1
            found = [page for first, end in log.harvest() for page in range(first, end)]
            assert found == pages
        block.pages[:, 0] += 1
        assert log.harvest().tolist() == [[0, PAGES]]
        assert np.array_equal(np.unique(block.pages[:, 1]), [0])
    finally:
        log.stop()
        tracker.close()
        block.close()
