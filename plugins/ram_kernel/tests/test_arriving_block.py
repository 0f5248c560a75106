"""Compiled code for pages that arrive while the guest runs: what it refuses, and what it reports. That it stores the
right pages is tested in plugins/ram, beside the same in Python.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.ram import PAGE, noise, page_record

kernel: Any = pytest.importorskip(
    "corefw_ram_kernel", reason="needs plugins/ram_kernel, which `make dev` installs where it finds a C compiler"
)

PAGES: Final = 40
CONTENT: Final = noise(PAGES)
MISSING, CLAIMED, RECEIVED = 0, 1, 2
INSTALLED = 1


class Room:
    """A block's pages and marks. No guest waits for them, or one that cannot be served."""

    def __init__(self, userfaultfd: int = -1) -> None:
        self.ram: NDArray[np.uint8] = np.zeros((PAGES, PAGE), dtype=np.uint8)
        self.marks: NDArray[np.uint8] = np.zeros(PAGES, dtype=np.uint8)
        self.awaited: NDArray[np.uint8] = np.zeros(PAGES, dtype=np.uint8)
        self.journal = kernel.FaultJournal()
        self.block = self.make(userfaultfd=userfaultfd)

    def make(self, **different: int) -> Any:
        numbers: dict[str, Any] = {
            "ram": self.ram.ctypes.data,
            "pages": PAGES,
            "marks": self.marks.ctypes.data,
            "awaited": self.awaited.ctypes.data,
            "userfaultfd": -1,
            "address": 0,
            "journal": self.journal,
            "number": 3,
        }
        return kernel.ArrivingBlock(**(numbers | different))

    def store(self, data: bytes, *, begin: bool = False) -> Any:
        held = np.frombuffer(data, dtype=np.uint8)
        return self.block.store(held.ctypes.data, len(held), begin=begin)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    out, into = socket.socketpair()
    with out, into:
        into.setblocking(False)
        yield out, into


def records(*pages: int) -> bytes:
    return b"".join(page_record(page, CONTENT[page].tobytes()) for page in pages)


WRONG: Final[list[Callable[[Room, int], object]]] = [
    lambda room, fd: room.block.receive(fd, PAGES + 1, 1, None),
    lambda room, fd: room.block.receive(fd, -1, 1, None),
    lambda room, fd: room.block.receive(fd, 0, 1, _Begun(PAGES, 0)),
    lambda room, fd: room.block.receive(fd, 0, 1, _Begun(0, PAGE)),
    lambda room, _: room.block.claim(np.array([PAGES])),
    lambda room, _: room.block.claim(np.array([-1])),
    lambda room, _: room.block.give_up(np.array([0, PAGES])),
    lambda room, _: room.block.mark_received(np.array([PAGES])),
    lambda room, _: room.block.wait_for(np.array([PAGES])),
    lambda room, fd: room.make(ram=0).receive(fd, 0, 1, None),
    lambda room, fd: room.make(marks=0).receive_requested(fd),
    lambda room, fd: room.make(pages=1 << 60).receive(fd, 0, 1, None),
]


class _Begun:
    def __init__(self, page: int, size: int) -> None:
        self.page, self.size = page, size


@pytest.mark.parametrize("call", WRONG)
def test_numbers_that_do_not_fit_are_refused(
    call: Callable[[Room, int], object], pair: tuple[socket.socket, socket.socket]
) -> None:
    room = Room()
    pair[0].sendall(records(0))
    with pytest.raises(ValueError, match=r"cannot|no such pages"):
        call(room, pair[1].fileno())
    assert not room.ram.any() and not room.marks.any()


def test_a_guess_is_only_of_pages_that_are_missing_and_not_awaited(pair: tuple[socket.socket, socket.socket]) -> None:
    room = Room()
    room.block.mark_received(np.array([2]))
    room.block.claim(np.array([3]))
    room.block.wait_for(np.array([5]))
    pair[0].sendall(records(0, 1, 4, 6, 7))
    stored = room.block.receive(pair[1].fileno(), 0, PAGES, None)
    assert (stored.whole, stored.next, bytes(stored.left)) == (5, 8, b"")
    assert room.marks[:9].tolist() == [2, 2, 2, 1, 2, 0, 2, 2, 0]


def test_what_was_not_expected_comes_back_and_leaves_no_claim(pair: tuple[socket.socket, socket.socket]) -> None:
    room = Room()
    data = records(0, 1, 9, 10) + b"something else"
    pair[0].sendall(data)
    stored = room.block.receive(pair[1].fileno(), 0, PAGES, None)
    assert bytes(stored.left) == data[2 * (8 + PAGE) :]
    assert room.marks.tolist() == [RECEIVED] * 2 + [MISSING] * (PAGES - 2)


def test_a_page_that_is_cut_stays_claimed_and_is_gone_on_with(pair: tuple[socket.socket, socket.socket]) -> None:
    room = Room()
    data = records(0, 1)
    stored = room.store(data[:-100], begin=True)
    assert (stored.begun.page, stored.begun.size, room.marks[1]) == (1, PAGE - 100, CLAIMED)
    with pytest.raises(BlockingIOError):
        room.block.receive(pair[1].fileno(), stored.next, PAGES, stored.begun)
    assert room.marks[1] == CLAIMED, "it is the caller's"
    pair[0].sendall(data[-100:] + records(2))
    stored = room.block.receive(pair[1].fileno(), stored.next, PAGES, stored.begun)
    assert (stored.whole, stored.begun) == (1, None)
    assert (room.ram[:3] == CONTENT[:3]).all() and (room.marks[:3] == RECEIVED).all()


def test_a_received_page_cannot_be_given_up() -> None:
    room = Room()
    assert room.block.claim(np.array([1, 2])).all()
    room.block.mark_received(np.array([1]))
    room.block.give_up(np.array([1, 2]))
    assert room.marks[1:3].tolist() == [RECEIVED, MISSING]


def test_awaited_pages_are_noted_with_the_time(pair: tuple[socket.socket, socket.socket]) -> None:
    room = Room()
    assert room.block.wait_for(np.array([7])).all()
    before = time.monotonic_ns()
    pair[0].sendall(records(7, 8))
    assert room.block.receive_requested(pair[1].fileno()).failed is None
    ((when, *event),) = room.journal.take().tolist()
    assert event == [INSTALLED, 3, 7, 0] and before <= when <= time.monotonic_ns()
    assert len(room.journal.take()) == 0
    assert room.marks[7:9].tolist() == [RECEIVED, RECEIVED]


def test_pages_that_cannot_be_installed_are_reported(pair: tuple[socket.socket, socket.socket]) -> None:
    no_userfaultfd = os.eventfd(0)
    try:
        room = Room(no_userfaultfd)
        room.block.wait_for(np.array([4]))
        pair[0].sendall(records(3, 4, 5))
        stored = room.store(records(3, 4, 5, 9))
        assert stored.failed == (3, 10), "from the first such page to the last"
        assert len(room.journal.take()) == 0
        assert (room.marks[[3, 4, 5, 9]] == RECEIVED).all(), "they have arrived"
    finally:
        os.close(no_userfaultfd)


def test_a_connection_that_breaks_while_no_fault_comes_is_reported(pair: tuple[socket.socket, socket.socket]) -> None:
    """Whoever else finds that it has broken waits for all who use the socket."""
    out, into = pair
    room, faults, wake = Room(), os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
    try:
        server = kernel.FaultServer(userfaultfd=faults, journal=room.journal, blocks=[(room.block, bytes(16))])
        into.close()
        served = server.serve(out.fileno(), wake, 10)
        assert isinstance(served.error, BrokenPipeError)
        assert (served.unsent, served.missed) == (b"", [])
    finally:
        os.close(faults)
        os.close(wake)
