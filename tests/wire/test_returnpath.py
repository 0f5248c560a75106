"""Messages of the return path: writing, reading, and what a source refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.errors import RemoteStreamError, StreamError
from corefw.wire.constants import ReturnMessage
from corefw.wire.returnpath import (
    PageRequest,
    ReturnMessageRecord,
    encode_return_message,
    number_body,
    page_request_message,
    parse_number,
    parse_page_request,
    parse_recv_bitmap,
    read_return_message,
    recv_bitmap_body,
)
from corefw.wire.stream import MemorySource, StreamReader


def read(data: bytes) -> ReturnMessageRecord:
    return read_return_message(StreamReader(MemorySource(data)))


@pytest.mark.parametrize(
    ("message", "body", "data"),
    [
        (ReturnMessage.SHUT, number_body(0), b"\0\1\0\4\0\0\0\0"),
        (ReturnMessage.PONG, number_body(7), b"\0\2\0\4\0\0\0\7"),
        (ReturnMessage.RECV_BITMAP, recv_bitmap_body("pc.ram"), b"\0\5\0\7\6pc.ram"),
        (ReturnMessage.RESUME_ACK, number_body(1), b"\0\6\0\4\0\0\0\1"),
        (ReturnMessage.SWITCHOVER_ACK, b"", b"\0\7\0\0"),
    ],
)
def test_a_message_is_written_and_read(message: ReturnMessage, body: bytes, data: bytes) -> None:
    assert encode_return_message(message, body) == data
    assert read(data) == ReturnMessageRecord(message, body)
    for length in range(len(data)):
        with pytest.raises(RemoteStreamError):
            read(data[:length])


def test_bodies_are_read_back() -> None:
    assert parse_number(number_body(1 << 31)) == 1 << 31
    assert parse_recv_bitmap(recv_bitmap_body("pc.ram")) == "pc.ram"


@pytest.mark.parametrize(
    ("request_", "data"),
    [
        (PageRequest(0x2000, 4096), b"\0\4\0\x0c\0\0\0\0\0\0\x20\0\0\0\x10\0"),
        (PageRequest(0x2000, 4096, "pc.ram"), b"\0\3\0\x13\0\0\0\0\0\0\x20\0\0\0\x10\0\6pc.ram"),
    ],
)
def test_page_requests(request_: PageRequest, data: bytes) -> None:
    assert page_request_message(request_) == data
    assert parse_page_request(read(data)) == request_


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\0\0\0\0", "from 1 to 7, got type 0"),
        (b"\0\x08\0\0", "got type 8"),
        (b"\0\1\0\5", "4 bytes of body for message SHUT, got 5"),
        (b"\0\5\2\1", "at most 512 bytes"),
    ],
)
def test_what_a_source_refuses(data: bytes, expected: str) -> None:
    with pytest.raises(RemoteStreamError, match=expected):
        read(data)


@pytest.mark.parametrize("body", [bytes(12), bytes(12) + b"\3ab", bytes(12) + b"\1ab", bytes(12) + b"\1\xff"])
def test_a_request_whose_name_does_not_fit_is_refused(body: bytes) -> None:
    with pytest.raises(StreamError, match="REQ_PAGES_ID"):
        parse_page_request(ReturnMessageRecord(ReturnMessage.REQ_PAGES_ID, body))


def test_a_name_has_a_limit() -> None:
    assert parse_recv_bitmap(recv_bitmap_body("x" * 255)) == "x" * 255
    with pytest.raises(StreamError, match="255"):
        recv_bitmap_body("x" * 256)
    with pytest.raises(StreamError):
        parse_recv_bitmap(b"")


@given(st.binary(max_size=600))
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        record = read(data)
    except RemoteStreamError:
        return
    assert data.startswith(encode_return_message(record.type, record.body))
