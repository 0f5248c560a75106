"""A process whose memory is served page by page: it waits for pages that are not installed, and sees those that are."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from corefw.errors import MachineError
from corefw.memory import userfault
from corefw.memory.faults import open_faults
from corefw.memory.slices import SHORT
from tests.helpers.watched import PAGE, Guest

SMALL, LARGE = 64, 8192
"""Sizes in pages: for a memfd, and for a file of huge pages if the host has them."""


@pytest.fixture
def make_guest() -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def make(pages: int, touch: Callable[[np.ndarray[Any, Any]], Any]) -> Guest:
        guests.append(Guest(pages, touch))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_page_is_awaited_and_then_seen(make_guest: Callable[..., Guest], size: int) -> None:
    guest = make_guest(size, lambda pages: [int(pages[7, 5]), int(pages[size - 1, 5])])
    guest.run()
    assert guest.next_faults() == [7]
    guest.block.pages[7] = 3
    guest.install(7)
    assert guest.next_faults() == [size - 1]
    guest.block.store(np.array([size - 1]), np.full((1, PAGE), 9, dtype=np.uint8))
    guest.install(size - 1)
    assert guest.result() == "[3, 9]"


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_is_there_but_not_installed_is_awaited_too(make_guest: Callable[..., Guest], size: int) -> None:
    """A page that was sent in precopy and has changed since must never be seen."""
    guest = make_guest(size, lambda pages: [int(pages[1, 0]), int(pages[2, 0])])
    guest.block.pages[:4] = 1
    guest.install(1)
    guest.run()
    assert guest.next_faults() == [2]
    guest.block.pages[2] = 2
    guest.install(2)
    assert guest.result() == "[1, 2]"


def test_runs_with_holes_and_with_pages_that_were_installed_before(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(SMALL, lambda pages: pages[:, 0].tolist())
    for page in range(0, SMALL, 3):
        guest.block.pages[page] = page + 1
    guest.install(0, 5, 6, 40)
    guest.install(*range(SMALL))
    guest.run()
    assert guest.result() == repr([page + 1 if page % 3 == 0 else 0 for page in range(SMALL)])


def test_a_write_of_the_guest_is_in_the_block(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(SMALL, lambda pages: pages[9].__setitem__(0, 77))
    guest.run()
    assert guest.next_faults() == [9]
    guest.install(9)
    assert guest.result() == "None"
    assert guest.block.pages[9, 0] == 77


def test_release_shows_everything(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(SMALL, lambda pages: int(pages.sum()))
    guest.block.pages[3] = 1
    guest.run()
    assert guest.next_faults() == [0]
    guest.faults.release()
    guest.faults.release()
    assert guest.result() == str(PAGE)


def test_after_close_the_guest_waits_until_it_is_killed(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(SMALL, lambda pages: int(pages[1, 0]))
    guest.run()
    assert guest.next_faults() == [1]
    guest.faults.close()
    guest.link.settimeout(0.2)
    with pytest.raises(TimeoutError):
        guest.result()


def test_a_guest_that_has_ended_needs_no_page(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(SMALL, lambda pages: int(pages[1, 0]))
    guest.run()
    assert guest.next_faults() == [1]
    guest.process.kill()
    guest.process.join()
    guest.install(1)


def slice_of(process: int) -> int:
    """What a thread has, in nanoseconds; before Linux 6.12 0."""
    attributes = ctypes.create_string_buffer(56)
    number = {"x86_64": 315}.get(os.uname().machine, 275)
    assert not ctypes.CDLL(None).syscall(ctypes.c_long(number), process, attributes, len(attributes), 0)
    return int.from_bytes(attributes.raw[24:32], "little")


def test_a_guest_asks_for_short_slices_as_long_as_it_may_wait_for_pages(make_guest: Callable[..., Guest]) -> None:
    usual = slice_of(0)
    guest = make_guest(SMALL, lambda pages: int(pages[1, 0]))
    process = guest.process.pid or 0
    assert slice_of(process) == (SHORT if usual else 0)
    guest.faults.release()
    assert slice_of(process) == usual


def test_a_host_that_denies_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(_features: userfault.Feature) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(userfault, "create", deny)
    monkeypatch.setattr(userfault, "create_unrestricted", deny)
    with pytest.raises(MachineError, match=r"not permitted.*vm\.unprivileged_userfaultfd"):
        open_faults()


def test_a_host_with_larger_pages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corefw.memory.faults.HOST_PAGE", 1 << 16)
    with pytest.raises(MachineError, match="65536 bytes at once"):
        open_faults()


def test_a_kernel_without_minor_faults_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("create", "create_unrestricted"):
        create = getattr(userfault, name)
        monkeypatch.setattr(userfault, name, lambda features, create=create: create(features | 1 << 60))
    with pytest.raises(MachineError, match=r"Linux 5\.14"):
        open_faults()
