"""Compiled code that answers page requests: what is asked for goes out once, and everything that is not a plain request
is left to the caller. That PostcopyPageSaver makes use of it is tested in plugins/ram.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from corefw.wire.constants import ReturnMessage
from corefw.wire.returnpath import PageRequest, encode_return_message, number_body, page_request_message
from tests.helpers.ram import EOS, PAGE, fill_record, noise, page_record, page_records

kernel: Any = pytest.importorskip(
    "corefw_ram_kernel", reason="needs plugins/ram_kernel, which `make dev` installs where it finds a C compiler"
)

PAGES: Final = 40
SMALL: Final = 3
CONTENT: Final = noise(PAGES)
ZERO: Final = 5
LONG: Final = "x" * 255
DESCRIPTORS: Final = Path("/proc/self/fd")
TOO_MANY: Final = 1025
"""Pages of a request that is not answered by compiled code."""


class Room:
    """Two blocks of noise, with a zero page and a hole in the first, and the server of their pages."""

    def __init__(self, out: socket.socket, into: socket.socket, asked: str | None = None, pages: int = PAGES) -> None:
        self.ram = {"ram": np.resize(CONTENT, (pages, PAGE)), LONG: CONTENT[:SMALL].copy()}
        self.ram["ram"][ZERO] = 0
        self.dirty = {name: np.ones(len(ram), dtype=np.bool_) for name, ram in self.ram.items()}
        self.hole = {name: np.zeros(len(ram), dtype=np.bool_) for name, ram in self.ram.items()}
        self.hole["ram"][ZERO + 1] = True
        self.server = kernel.PageServer(
            {
                name: kernel.DirtyBlock(
                    ram=ram.ctypes.data,
                    pages=len(ram),
                    dirty=self.dirty[name].ctypes.data,
                    hole=self.hole[name].ctypes.data,
                )
                for name, ram in self.ram.items()
            }
        )
        self.server.asked = asked
        self.out, self.into = out, into

    def serve(self) -> int:
        taken: int = self.server.serve(self.into.fileno(), self.out.fileno())
        return taken

    def record(self, name: str, page: int, *, named: bool) -> bytes:
        idstr = name if named else None
        if name == "ram" and page in (ZERO, ZERO + 1):
            return fill_record(page, 0, idstr)
        return page_record(page, self.ram[name][page].tobytes(), idstr)

    def claimed(self) -> dict[str, list[int]]:
        return {name: np.flatnonzero(~dirty).tolist() for name, dirty in self.dirty.items()}


class Wires(NamedTuple):
    """The return path and the channel of requested pages, each from end to end."""

    destination: socket.socket
    incoming: socket.socket
    outgoing: socket.socket
    pages: socket.socket

    def room(self, **different: Any) -> Room:
        return Room(self.outgoing, self.incoming, **different)


@pytest.fixture
def wires() -> Iterator[Wires]:
    destination, incoming = socket.socketpair()
    outgoing, pages = socket.socketpair()
    with destination, incoming, outgoing, pages:
        incoming.setblocking(False)
        pages.setblocking(False)
        yield Wires(destination, incoming, outgoing, pages)


def ask(first: int, count: int = 1, block: str | None = None) -> bytes:
    return page_request_message(PageRequest(first * PAGE, count * PAGE, block))


def raw(message: int, body: bytes) -> bytes:
    return message.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body


def test_what_is_asked_for_goes_out_once(wires: Wires) -> None:
    room = wires.room()
    messages = [ask(4, 3, "ram"), ask(4), ask(0, SMALL, LONG), ask(1), ask(9, block="ram")]
    wires.destination.sendall(b"".join(messages))
    assert room.serve() == sum(map(len, messages))
    assert room.server.left == b"" and not room.server.unfinished
    expected = (
        room.record("ram", 4, named=True) + room.record("ram", 5, named=False) + room.record("ram", 6, named=False)
    )
    expected += b"".join(room.record(LONG, page, named=page == 0) for page in range(SMALL))
    expected += room.record("ram", 9, named=True)
    assert wires.pages.recv(1 << 20) == expected
    assert room.server.sent == len(expected)
    assert room.claimed() == {"ram": [4, 5, 6, 9], LONG: [0, 1, 2]}
    assert room.server.asked == room.server.named == "ram"
    assert room.server.claiming
    assert room.server.take() == (5, {"ram": 4, LONG: 3}, 2)
    assert room.server.take() == (0, {}, 0)
    assert not room.server.claiming


def test_a_record_of_the_same_block_as_before_does_not_name_it(wires: Wires) -> None:
    room = wires.room(asked="ram")
    room.server.named = "ram"
    wires.destination.sendall(ask(7))
    room.serve()
    assert wires.pages.recv(1 << 20) == room.record("ram", 7, named=False)


LEFT: Final = {
    "another message": encode_return_message(ReturnMessage.PONG, number_body(3)),
    "unaligned": raw(ReturnMessage.REQ_PAGES, (1).to_bytes(8, "big") + PAGE.to_bytes(4, "big")),
    "part of a page": raw(ReturnMessage.REQ_PAGES, bytes(8) + (PAGE + 8).to_bytes(4, "big")),
    "nothing": raw(ReturnMessage.REQ_PAGES, bytes(12)),
    "behind the end": ask(PAGES),
    "over the end": ask(PAGES - 1, 2),
    "at the end of all addresses": raw(ReturnMessage.REQ_PAGES, b"\xff" * 6 + b"\xf0\0" + b"\0\0\x20\0"),
    "another block": ask(0, 1, "rom"),
    "a block's name that is cut": raw(ReturnMessage.REQ_PAGES_ID, ask(0)[4:] + b"\4ram"),
    "no name": raw(ReturnMessage.REQ_PAGES_ID, ask(0)[4:]),
    "bytes behind the name": raw(ReturnMessage.REQ_PAGES_ID, ask(0)[4:] + b"\3ramp"),
    "a body that is too long": raw(ReturnMessage.REQ_PAGES, ask(0)[4:] + b"\0"),
}

PARTS: Final = [
    ask(0)[:3],
    ask(0)[:-1],
    ask(0, block="ram")[:-1],
    raw(ReturnMessage.REQ_PAGES_ID, ask(0)[4:] + bytes([200]) + bytes(200))[:100],
]


@pytest.mark.parametrize("what", LEFT)
def test_everything_else_is_left_to_the_caller(wires: Wires, what: str) -> None:
    """With what follows it, and after what came before was answered."""
    room = wires.room(asked="ram")
    wires.destination.sendall(ask(3) + LEFT[what] + ask(1))
    assert room.serve() == len(ask(3) + LEFT[what] + ask(1))
    assert room.server.left == LEFT[what] + ask(1)
    assert room.claimed() == {"ram": [3], LONG: []}


@pytest.mark.parametrize("part", PARTS)
def test_a_message_that_has_not_come_whole_is_left_to_the_caller(wires: Wires, part: bytes) -> None:
    room = wires.room(asked="ram")
    wires.destination.sendall(ask(3) + part)
    room.serve()
    assert room.server.left == part
    assert room.claimed() == {"ram": [3], LONG: []}


def test_a_request_for_very_many_pages_is_left_to_the_caller(wires: Wires) -> None:
    room = wires.room(asked="ram", pages=TOO_MANY)
    wires.destination.sendall(ask(0, TOO_MANY))
    room.serve()
    assert room.server.left == ask(0, TOO_MANY)
    assert room.claimed()["ram"] == []


def test_a_request_without_a_name_needs_one_before(wires: Wires) -> None:
    room = wires.room(asked="rom")
    wires.destination.sendall(ask(0))
    room.serve()
    assert room.server.left == ask(0) and room.server.asked is None


plain = st.builds(ask, st.integers(0, PAGES + 1), st.integers(0, 4), st.sampled_from([None, "ram", LONG, "rom"]))


@settings(deadline=None, max_examples=100)
@given(messages=st.lists(plain | st.binary(max_size=40) | st.sampled_from([*LEFT.values(), *PARTS]), max_size=12))
@example(messages=[bytes([0, 3, 255, 255]) + bytes(60)])
def test_whatever_comes_is_answered_or_left(messages: Sequence[bytes]) -> None:
    data = b"".join(messages)
    (destination, incoming), (outgoing, pages) = socket.socketpair(), socket.socketpair()
    with destination, incoming, outgoing, pages:
        room = Room(outgoing, incoming)
        destination.sendall(data)
        destination.shutdown(socket.SHUT_WR)
        assert room.serve() == len(data)
        assert data.endswith(room.server.left)
        outgoing.shutdown(socket.SHUT_WR)
        got = b"".join(iter(lambda: pages.recv(1 << 20), b""))
        records = [(one.block, one.page) for one in page_records(got + EOS)]
        assert sorted(records) == sorted((name, page) for name, found in room.claimed().items() for page in found)
        assert sum(room.server.take().claimed.values()) == len(records)


def test_a_socket_that_is_full_is_gone_on_with(wires: Wires) -> None:
    room = wires.room()
    wires.outgoing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    wires.outgoing.setblocking(False)
    wires.destination.sendall(ask(0, PAGES, "ram") + ask(0, block=LONG))
    room.serve()
    assert room.server.unfinished and room.server.left == ask(0, block=LONG)
    with pytest.raises(ValueError, match="the blocks were changed"):
        room.serve()
    with pytest.raises(BlockingIOError):
        room.server.finish(wires.outgoing.fileno())
    got = b""
    while room.server.unfinished:
        got += wires.pages.recv(1 << 20)
        try:
            room.server.finish(wires.outgoing.fileno())
        except BlockingIOError:
            continue
    while len(got) < room.server.sent:
        got += wires.pages.recv(1 << 20)
    assert got == b"".join(room.record("ram", page, named=page == 0) for page in range(PAGES))
    assert room.server.take() == (1, {"ram": PAGES}, 2)


def test_a_broken_channel_is_an_oserror(wires: Wires) -> None:
    room = wires.room()
    wires.pages.close()
    wires.destination.sendall(ask(0, block="ram"))
    assert room.serve() == len(ask(0, block="ram")), "the return path works"
    assert room.server.unfinished
    with pytest.raises(BrokenPipeError):
        room.server.finish(wires.outgoing.fileno())
    assert room.server.take().claimed == {"ram": 1}


def test_the_reason_of_a_break_is_the_one_that_the_kernel_gave_first(wires: Wires) -> None:
    """It says ECONNRESET once, and EPIPE from then on."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as outgoing:
        pages, _ = server.accept()
        pages.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        pages.close()
        broken = select.poll()
        broken.register(outgoing, 0)
        assert broken.poll(10_000)
        room = Room(outgoing, wires.incoming)
        wires.destination.sendall(ask(0, block="ram"))
        room.serve()
        with pytest.raises(ConnectionResetError):
            room.server.finish(outgoing.fileno())


def test_nothing_is_a_blockingioerror_and_the_end_is_nothing_taken(wires: Wires) -> None:
    room = wires.room()
    with pytest.raises(BlockingIOError):
        room.serve()
    wires.destination.close()
    assert room.serve() == 0
    assert not room.server.unfinished


def test_descriptors_that_are_none(wires: Wires) -> None:
    room = wires.room()
    for incoming, outgoing in ((-1, wires.outgoing.fileno()), (wires.incoming.fileno(), -1)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            room.server.serve(incoming, outgoing)
    with pytest.raises(OSError, match="Bad file descriptor"):
        room.server.finish(-1)


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 255 bytes"):
        kernel.PageServer({"x" * 256: kernel.DirtyBlock(ram=PAGE, pages=1, dirty=PAGE, hole=PAGE)})


def test_no_descriptor_is_left_open(wires: Wires) -> None:
    room = wires.room()
    before = len(list(DESCRIPTORS.iterdir()))
    for page in range(PAGES):
        wires.destination.sendall(ask(page, block="ram"))
        room.serve()
    assert len(list(DESCRIPTORS.iterdir())) - before < PAGES
