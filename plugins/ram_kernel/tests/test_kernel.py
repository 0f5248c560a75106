"""The compiled loop: whatever comes, bytes go only where they belong, and the result says how far all was right."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.helpers.ram import PAGE, noise, page_record

kernel: Any = pytest.importorskip(
    "corefw_ram_kernel", reason="needs plugins/ram_kernel, which `make dev` installs where it finds a C compiler"
)

RECORD: Final = 8 + PAGE
PAGES: Final = 40
CONTENT: Final = noise(PAGES)
UNTOUCHED: Final = 0xEE


class Room:
    """A block's pages and room for headers, each with something behind it that must stay as it is."""

    def __init__(self, pages: int = PAGES) -> None:
        self.pages = pages
        self.ram: NDArray[np.uint8] = np.full((pages + 1, PAGE), UNTOUCHED, dtype=np.uint8)
        self.headers: NDArray[np.uint8] = np.full((kernel.LIST + 1, 8), UNTOUCHED, dtype=np.uint8)

    def receive(self, descriptor: int, first: int = 0, size: int = 4, most: int = 8, total: int = PAGES) -> Result:
        places = {"ram": self.ram.ctypes.data, "pages": self.pages, "headers": self.headers.ctypes.data}
        result = Result(*kernel.receive_lists(descriptor, **places, first=first, size=size, most=most, total=total))
        assert (self.ram[-1] == UNTOUCHED).all() and (self.headers[-1] == UNTOUCHED).all()
        return result


class Result(NamedTuple):
    whole: int
    listed: int
    size: int


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    out, into = socket.socketpair()
    with out, into:
        yield out, into


def records(first: int, count: int) -> bytes:
    return b"".join(page_record(page, CONTENT[page].tobytes()) for page in range(first, first + count))


def model(data: bytes, first: int, size: int, most: int, total: int) -> Result:
    """What there is to say of a stream of which no more has come than `data`."""
    whole, at, size = 0, 0, min(size, most)
    while whole < total:
        count = min(size, total - whole)
        part = data[at : at + count * RECORD]
        if part != records(first + whole, count):
            return Result(whole, count, len(part))
        whole, at, size = whole + count, at + len(part), min(2 * size, most)
    return Result(whole, 0, 0)


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """The page that is expected, how many, and a stream that is right up to some place, in a header, or cut there."""
    first = draw(st.integers(0, PAGES - 1))
    total = draw(st.integers(1, PAGES - first))
    data = bytearray(records(first, draw(st.integers(1, PAGES - first))))
    match draw(st.sampled_from(["right", "right", "cut", "changed", "noise"])):
        case "cut":
            del data[draw(st.integers(1, len(data))) :]
        case "changed":
            at = draw(st.integers(0, len(data) // RECORD - 1)) * RECORD + draw(st.integers(0, 7))
            data[at] ^= draw(st.integers(1, 255))
        case "noise":
            data = bytearray(draw(st.binary(min_size=1, max_size=64))) * 300
    return first, total, bytes(data)


@settings(max_examples=200)
@given(stream=streams(), size=st.integers(1, 20), most=st.integers(1, 20))
@example((0, 7, records(0, 8)), 1, 4)
def test_the_result_is_what_a_simple_reader_finds(stream: tuple[int, int, bytes], size: int, most: int) -> None:
    first, total, data = stream
    out, into = socket.socketpair()
    with out, into:
        into.setblocking(False)
        out.sendall(data)
        room = Room()
        result = room.receive(into.fileno(), first, size, most, total)
        assert result == model(data, first, size, most, total)
        assert (room.ram[first : first + result.whole] == CONTENT[first : first + result.whole]).all()
        assert (room.ram[:first] == UNTOUCHED).all()
        assert (room.ram[first + total :] == UNTOUCHED).all(), "no more than was asked for"
        came = data[result.whole * RECORD :][: result.size]
        headers = b"".join(came[at : at + 8] for at in range(0, len(came), RECORD))
        pages = b"".join(came[at + 8 : at + RECORD] for at in range(0, len(came), RECORD))
        assert room.headers.tobytes().startswith(headers) or not came
        assert room.ram[first + result.whole :].tobytes().startswith(pages)
        unread = len(data) - result.whole * RECORD - result.size
        assert len(into.recv(unread + 1) if unread else b"") == unread, "what is not in the result is still unread"


WRONG: Final[list[dict[str, int]]] = [
    {"first": PAGES, "total": 1},
    {"first": PAGES - 1, "total": 2},
    {"first": 0, "total": PAGES + 1},
    {"first": 0, "total": 0},
    {"first": -1, "total": 1},
    {"first": (1 << 64) - 1, "total": 2},
    {"first": 1, "total": (1 << 64) - 1},
    {"first": 1 << 64, "total": 1},
    {"size": 0},
    {"size": 513},
    {"most": 0},
    {"most": 513},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_numbers_that_do_not_fit_are_refused_before_anything_is_received(
    pair: tuple[socket.socket, socket.socket], wrong: dict[str, int]
) -> None:
    out, into = pair
    out.sendall(records(0, 1))
    room = Room()
    with pytest.raises(ValueError, match="cannot receive"):
        room.receive(into.fileno(), **wrong)
    assert (room.ram == UNTOUCHED).all()
    assert len(into.recv(RECORD)) == RECORD


@pytest.mark.parametrize("wrong", [{"ram": 0}, {"headers": 0}, {"pages": 1 << 63}], ids=str)
def test_addresses_that_cannot_be_are_refused(pair: tuple[socket.socket, socket.socket], wrong: dict[str, int]) -> None:
    room = Room()
    right = {"ram": room.ram.ctypes.data, "pages": PAGES, "headers": room.headers.ctypes.data}
    with pytest.raises(ValueError, match="cannot receive"):
        kernel.receive_lists(pair[1].fileno(), **(right | wrong), first=0, size=4, most=4, total=4)


def test_the_end_and_silence_differ(pair: tuple[socket.socket, socket.socket]) -> None:
    out, into = pair
    into.setblocking(False)
    with pytest.raises(BlockingIOError):
        Room().receive(into.fileno())
    out.sendall(records(0, 4))
    assert Room().receive(into.fileno()) == (4, 8, 0)
    out.close()
    assert Room().receive(into.fileno()) == (0, 4, 0)


def test_a_failure_is_an_oserror(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        Room().receive(-1)
    pair[0].sendall(records(0, 4))
    room = Room()
    room_of_none = {"ram": PAGE, "pages": PAGES, "headers": room.headers.ctypes.data}  # an address that is never mapped
    with pytest.raises(OSError, match="Bad address"):
        kernel.receive_lists(pair[1].fileno(), **room_of_none, first=0, size=4, most=4, total=4)


def test_other_threads_run_while_it_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    """The sender needs the interpreter for each page, and the socket holds only some of them."""
    out, into = pair
    content = noise(kernel.LIST)

    def send() -> None:
        for page in range(kernel.LIST):
            out.sendall(page_record(page, content[page].tobytes()))

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        all_at_once = {"size": kernel.LIST, "most": kernel.LIST, "total": kernel.LIST}
        assert Room(kernel.LIST).receive(into.fileno(), **all_at_once) == (kernel.LIST, 0, 0)
        sent.result()


def test_a_descriptor_that_is_closed_meanwhile_is_not_confused_with_the_next_of_its_number() -> None:
    out, into = socket.socketpair()
    number = into.fileno()
    room = Room()
    with out, into, ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(room.receive, number)
        out.sendall(records(0, 4))
        while not (room.ram[3] == CONTENT[3]).all():
            time.sleep(0.001)
        stranger, other = socket.socketpair()
        with stranger, other:
            stranger.sendall(records(4, 8))
            os.dup2(other.fileno(), number)  # closes it, and gives its number to another socket
            out.sendall(records(4, PAGES - 4))
            assert receiving.result() == (PAGES, 0, 0)
            assert len(other.recv(1 << 20)) == 8 * RECORD, "nothing was taken from the other socket"
