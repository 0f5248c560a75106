"""Compiled code for what the source of a postcopy has left: every dirty page goes out once, whole, whatever the socket
takes at once and whoever else claims pages. That PostcopyPageSaver makes use of it is tested in plugins/ram.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from corefw.wire.constants import RamFlag
from corefw.wire.stream import MemorySource, StreamReader
from tests.helpers.ram import PAGE, noise

kernel: Any = pytest.importorskip(
    "corefw_ram_kernel", reason="needs plugins/ram_kernel, which `make dev` installs where it finds a C compiler"
)

PAGES: Final = 300
CONTENT: Final = noise(PAGES)
ZEROS: Final = range(40, 60)
HOLES: Final = range(100, 150)


class Room:
    """A block of noise with some zero pages, and some holes, which must not be read: they hold noise, too."""

    def __init__(self, dirty: NDArray[np.bool_] | None = None) -> None:
        self.ram = CONTENT.copy()
        self.ram[ZEROS] = 0
        self.dirty = np.ones(PAGES, dtype=np.bool_) if dirty is None else dirty.copy()
        self.hole = np.zeros(PAGES, dtype=np.bool_)
        self.hole[HOLES] = True
        self.block = self.make()

    def make(self, **different: int) -> Any:
        numbers = {
            "ram": self.ram.ctypes.data,
            "pages": PAGES,
            "dirty": self.dirty.ctypes.data,
            "hole": self.hole.ctypes.data,
        }
        return kernel.DirtyBlock(**(numbers | different))

    def send_all(self, descriptor: int) -> list[int]:
        """Send what is dirty; the pages in their order."""
        sent: list[int] = []
        while self.block.next < PAGES:
            self.block.begin(self.block.next, 64)
            while True:
                try:
                    self.block.send(descriptor)
                except BlockingIOError:
                    continue
                if self.block.done:
                    break
            sent += self.block.claimed.tolist()
        return sent


def pages_in(data: bytes) -> dict[int, bytes]:
    """The pages that these records bring, each once."""
    reader = StreamReader(MemorySource(data))
    found: dict[int, bytes] = {}
    while not reader.at_end():
        header = reader.be64("a header")
        flags, page = header % PAGE, header // PAGE
        assert flags in (RamFlag.PAGE | RamFlag.CONTINUE, RamFlag.ZERO | RamFlag.CONTINUE)
        assert page not in found
        found[page] = bytes([reader.u8("a fill byte")] * PAGE) if flags & RamFlag.ZERO else reader.read(PAGE, "a page")
    return found


def receive_rest(into: socket.socket) -> bytes:
    data = bytearray()
    while part := into.recv(1 << 20):
        data += part
    return bytes(data)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    out, into = socket.socketpair()
    with out, into:
        yield out, into


@settings(deadline=None, max_examples=40)
@given(chosen=st.sets(st.integers(0, PAGES - 1)), pieces=st.integers(1, 1 << 16))
def test_every_dirty_page_goes_out_once(chosen: set[int], pieces: int) -> None:
    """Also over a socket that takes few bytes at once, and gives up often."""
    dirty = np.zeros(PAGES, dtype=np.bool_)
    dirty[list(chosen)] = True
    room = Room(dirty)
    out, into = socket.socketpair()
    with out, into, ThreadPoolExecutor(1) as pool:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, pieces)
        out.setblocking(False)
        received = pool.submit(receive_rest, into)
        sent = room.send_all(out.fileno())
        out.shutdown(socket.SHUT_WR)
        found = pages_in(received.result())
    assert sent == sorted(chosen) == list(found)
    assert not room.dirty.any()
    room.ram[HOLES] = 0
    assert all(content == room.ram[page].tobytes() for page, content in found.items())


def test_zero_pages_are_counted(pair: tuple[socket.socket, socket.socket]) -> None:
    dirty = np.zeros(PAGES, dtype=np.bool_)
    dirty[[39, 40, 99, 100]] = True
    room = Room(dirty)
    room.block.begin(0, 64)
    assert room.block.send(pair[0].fileno()) == 2 * (8 + PAGE) + 2 * 9
    assert room.block.done and room.block.zeros == 2 and room.block.next == PAGES


def test_a_page_is_zero_only_if_all_of_it_is(pair: tuple[socket.socket, socket.socket]) -> None:
    dirty = np.zeros(PAGES, dtype=np.bool_)
    dirty[[40, 41]] = True
    room = Room(dirty)
    room.ram[40, PAGE - 1] = room.ram[41, 8] = 1
    room.block.begin(0, 2)
    room.block.send(pair[0].fileno())
    assert room.block.zeros == 0


def test_no_more_is_claimed_than_asked_for(pair: tuple[socket.socket, socket.socket]) -> None:
    room = Room()
    room.block.begin(7, 3)
    room.block.send(pair[0].fileno())
    assert room.block.claimed.tolist() == [7, 8, 9] and room.block.next == 10
    assert np.flatnonzero(~room.dirty).tolist() == [7, 8, 9]


def test_two_threads_never_send_the_same_page() -> None:
    """The other one claims pages as requests come."""
    room = Room()
    out, into = socket.socketpair()
    begun = threading.Event()

    def claim() -> list[int]:
        begun.wait()
        return [page for page in range(PAGES - 1, -1, -3) if room.block.claim(np.array([page]))[0]]

    with out, into, ThreadPoolExecutor(2) as pool:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        received, claimed = pool.submit(receive_rest, into), pool.submit(claim)
        begun.set()
        sent = room.send_all(out.fileno())
        taken = claimed.result()
        out.shutdown(socket.SHUT_WR)
        found = pages_in(received.result())
    assert sent == list(found)
    assert sorted([*sent, *taken]) == list(range(PAGES))


def test_what_a_broken_connection_did_not_take_is_an_oserror(pair: tuple[socket.socket, socket.socket]) -> None:
    room = Room()
    pair[1].close()
    room.block.begin(0, 64)
    with pytest.raises(BrokenPipeError):
        room.block.send(pair[0].fileno())
    assert not room.block.done, "nobody counts as having these pages"
    assert len(room.block.claimed) == kernel.PIECE
    with pytest.raises(ValueError, match="cannot send"):
        room.block.begin(0, 64)
    with pytest.raises(OSError, match="Bad file descriptor"):
        room.block.send(-1)


def test_a_full_socket_is_a_blockingioerror(pair: tuple[socket.socket, socket.socket]) -> None:
    room = Room()
    pair[0].setblocking(False)
    room.block.begin(0, PAGES)
    with pytest.raises(BlockingIOError):
        while True:
            room.block.send(pair[0].fileno())
    claimed = len(room.block.claimed)
    assert not room.block.done and 0 < claimed < PAGES
    os.read(pair[1].fileno(), 1 << 20)
    assert room.block.send(pair[0].fileno()) > 0, "it goes on where it was"


@pytest.mark.parametrize(("first", "most"), [(PAGES + 1, 1), (-1, 1), (0, 0), (0, kernel.MOST + 1)])
def test_numbers_that_do_not_fit_are_refused(first: int, most: int) -> None:
    with pytest.raises(ValueError, match="cannot send"):
        Room().block.begin(first, most)


@pytest.mark.parametrize("page", [-1, PAGES, 1 << 40])
def test_a_page_that_the_block_has_not_cannot_be_claimed(page: int) -> None:
    room = Room()
    with pytest.raises(ValueError, match="no such pages"):
        room.block.claim(np.array([0, page]))
    assert room.dirty.all()


@pytest.mark.parametrize("wrong", [{"ram": 0}, {"dirty": 0}, {"hole": -1}, {"pages": 0}, {"pages": 1 << 64}])
def test_addresses_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot send"):
        Room().make(**wrong)
