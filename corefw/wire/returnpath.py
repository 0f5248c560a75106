"""The messages of the return path, from a destination to its source.

Invariant: a message is sent in one call, because several threads may answer. The length of a received one is checked
before its body is read: the source does not trust the destination either.

    u16 type, u16 length, body

Source: QEMU 7.2's migrate_send_rp_message and source_return_path_thread. The bitmap that follows RECV_BITMAP is no part
of the message.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from struct import Struct
from typing import Final

from corefw.errors import StreamError, one_line
from corefw.wire.constants import (
    BE32,
    PLUGIN_MESSAGES,
    REASON_LIMIT,
    RETURN_MESSAGE_LENGTHS,
    RETURN_MESSAGE_LIMIT,
    ReturnMessage,
)
from corefw.wire.stream import StreamReader

HEADER: Final = Struct(">HH")
"""Type and length of the body."""

_REQUEST: Final = Struct(">QI")


@dataclass(frozen=True, slots=True)
class ReturnMessageRecord:
    """One message. `type` is a number of PLUGIN_MESSAGES if a plugin defined it."""

    type: ReturnMessage | int
    body: bytes


def read_return_message(reader: StreamReader, of_plugins: Container[int] = ()) -> ReturnMessageRecord:
    """Read a message. `of_plugins` are the accepted numbers of PLUGIN_MESSAGES. Raises RemoteStreamError for any other
    type, and for a length that the message cannot have."""
    number = reader.be16("the type of a return-path message")
    length = reader.be16("the length of a return-path message")
    if number in PLUGIN_MESSAGES and number in of_plugins:
        return ReturnMessageRecord(number, reader.read(length, f"the body of message {number}", RETURN_MESSAGE_LIMIT))
    try:
        message = ReturnMessage(number)
    except ValueError:
        last = ReturnMessage.SWITCHOVER_ACK
        raise reader.error(f"a return-path message from {min(ReturnMessage)} to {last}", f"type {number}") from None
    expected = RETURN_MESSAGE_LENGTHS[message]
    if expected is not None and length != expected:
        raise reader.error(f"{expected} bytes of body for message {message.name}", f"{length}")
    limit = REASON_LIMIT if message is ReturnMessage.MIGFW_REASON else RETURN_MESSAGE_LIMIT
    return ReturnMessageRecord(message, reader.read(length, f"the body of {message.name}", limit))


def encode_return_message(message_type: ReturnMessage | int, body: bytes = b"") -> bytes:
    """The message's bytes, to be sent in one call."""
    if int(message_type) in PLUGIN_MESSAGES:  # an IntEnum would be compared with each of the 4096 numbers
        assert len(body) <= RETURN_MESSAGE_LIMIT, f"message {message_type} with {len(body)} bytes"
        return HEADER.pack(message_type, len(body)) + body
    message = ReturnMessage(message_type)
    expected = RETURN_MESSAGE_LENGTHS[message]
    assert expected is None or len(body) == expected, f"{message.name} with {len(body)} bytes"
    assert len(body) <= RETURN_MESSAGE_LIMIT, f"{message.name} with {len(body)} bytes"
    return HEADER.pack(message, len(body)) + body


# -- bodies ------------------------------------------------------------------------------------------------------------


def parse_number(body: bytes) -> int:
    """SHUT (not 0: the destination failed), PONG (the ping's number), RESUME_ACK (1)."""
    return int(BE32.unpack(body)[0])


def number_body(value: int) -> bytes:
    return BE32.pack(value)


def parse_reason(body: bytes) -> str:
    """The text of MIGFW_REASON, made into one printable line, whatever was sent."""
    return one_line(body.decode(errors="replace"))


def reason_body(text: str) -> bytes:
    """The text as one line, truncated to what fits into MIGFW_REASON."""
    data = one_line(text).encode(errors="replace")
    if len(data) <= REASON_LIMIT:
        return data
    return data[: REASON_LIMIT - 3].decode(errors="ignore").encode() + b"..."


@dataclass(frozen=True, slots=True)
class PageRequest:
    """`length` bytes from `start` on in RAM block `block`; None means the block named last."""

    start: int
    length: int
    block: str | None = None


def parse_page_request(record: ReturnMessageRecord) -> PageRequest:
    """The body of REQ_PAGES or REQ_PAGES_ID. Raises StreamError for a name that does not fill the body."""
    if record.type is not ReturnMessage.REQ_PAGES_ID:
        start, length = _REQUEST.unpack(record.body)
        return PageRequest(start, length)
    if len(record.body) <= _REQUEST.size:
        raise StreamError(f"REQ_PAGES_ID: expected more than {_REQUEST.size} bytes of body, got {len(record.body)}")
    start, length = _REQUEST.unpack_from(record.body)
    return PageRequest(start, length, _parse_string(record.body[_REQUEST.size :], "REQ_PAGES_ID"))


def page_request_message(request: PageRequest) -> bytes:
    """The whole message: REQ_PAGES_ID if a block is named, else REQ_PAGES."""
    body = _REQUEST.pack(request.start, request.length)
    if request.block is None:
        return encode_return_message(ReturnMessage.REQ_PAGES, body)
    return encode_return_message(ReturnMessage.REQ_PAGES_ID, body + _string(request.block))


def parse_recv_bitmap(body: bytes) -> str:
    """The RAM block whose bitmap follows the message."""
    return _parse_string(body, "RECV_BITMAP")


def recv_bitmap_body(block: str) -> bytes:
    return _string(block)


def _parse_string(data: bytes, what: str) -> str:
    if not data or len(data) != 1 + data[0]:
        raise StreamError(
            f"{what}: expected a block's name of {data[0] if data else 'some'} bytes, got {len(data) - 1}"
        )
    try:
        return data[1:].decode()
    except UnicodeDecodeError:
        raise StreamError(f"{what}: expected a block's name as text, got {data[1:]!r}") from None


def _string(text: str) -> bytes:
    data = text.encode()
    if len(data) > 255:
        raise StreamError(f"'{text}' is longer than the 255 bytes that a name in the stream can have")
    return bytes((len(data),)) + data
