"""The payloads of postcopy's commands: writing, reading, and refusing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from corefw.errors import RemoteStreamError, StreamError
from corefw.inspection import inspect
from corefw.wire.constants import Command
from corefw.wire.records import (
    Discard,
    discard_payload,
    discards,
    parse_discard,
    read_received_bitmap,
    write_received_bitmap,
)
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.golden.record import load

MARK = bytes.fromhex("0123456789abcdef")


def written(received: NDArray[np.bool_]) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_received_bitmap(writer, received)
    writer.flush()
    return bytes(sink.data)


def read(data: bytes, pages: int) -> NDArray[np.bool_]:
    return read_received_bitmap(StreamReader(MemorySource(data)), pages)


def test_a_discard_in_bytes() -> None:
    discard = Discard("pc.ram", ((0x1000, 0x2000), (0x8000, 0x1000)))
    data = b"\0\6pc.ram\0" + bytes.fromhex("0000000000001000 0000000000002000 0000000000008000 0000000000001000")
    assert discard_payload(discard) == data
    assert parse_discard(data) == discard


def test_many_runs_take_several_discards() -> None:
    runs = np.array([(at, at + 1) for at in range(0, 50, 2)])
    made = list(discards("ram", 4096, runs))
    assert [len(one.ranges) for one in made] == [12, 12, 1]
    assert made[-1] == Discard("ram", ((48 * 4096, 4096),))
    assert all(parse_discard(discard_payload(one)) == one for one in made)


def test_what_a_real_qemu_discards() -> None:
    records = [entry.record for entry in inspect(MemorySource(load("pc-postcopy"))).commands]
    payloads = [record.payload for record in records if record.command is Command.POSTCOPY_RAM_DISCARD]
    assert payloads
    assert [discard_payload(parse_discard(payload)) for payload in payloads] == payloads


@pytest.mark.parametrize("data", [b"", b"\0\3ab\0", b"\1\1a\0", b"\0\1a\1", b"\0\1a\0" + bytes(15), b"\0\1\xff\0"])
def test_a_discard_that_is_wrong_is_refused(data: bytes) -> None:
    with pytest.raises(StreamError, match="RAM_DISCARD"):
        parse_discard(data)


def test_a_bitmap_in_bytes() -> None:
    """Bits are in whole little-endian words: page 0 is the lowest bit of the first byte, page 65 in the second word."""
    received = np.zeros(66, dtype=np.bool_)
    received[[0, 9, 65]] = True
    data = bytes.fromhex("0000000000000010 0102000000000000 0200000000000000") + MARK
    assert written(received) == data
    assert read(data, 66).tolist() == received.tolist()


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_a_bitmap_is_read_back(pages: list[bool]) -> None:
    received = np.array(pages, dtype=np.bool_)
    assert read(written(received), len(pages)).tolist() == pages


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bytes(7), "the end of the stream"),
        (b"\xff" * 8, "a received bitmap of 8 bytes"),
        (bytes(7) + b"\x10" + bytes(16) + MARK, "a received bitmap of 8 bytes"),
        (bytes(7) + b"\x08" + bytes(4), "the end of the stream"),
        (bytes(7) + b"\x08" + bytes(8) + MARK[::-1], "end mark"),
    ],
)
def test_a_bitmap_that_is_wrong_is_refused(data: bytes, expected: str) -> None:
    with pytest.raises(RemoteStreamError, match=expected):
        read(data, 64)
