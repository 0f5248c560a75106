"""The messages between two ends: a byte stream in each direction, with credit-based flow control.

A message is one ZeroMQ message of one or two parts: a header (u8 kind, u64 argument, big-endian) and the payload.

    kind      argument                          payload
    HELLO     window                            MAGIC, version: the dialer's first message
    WELCOME   window                            MAGIC, version: the listener's answer
    REFUSE    0                                 reason, as text: the listener refuses
    DATA      offset of its first byte          1 to CHUNK bytes
    CREDIT    bytes consumed so far             -
    END       bytes sent in all                 -                 no more DATA follows
    SEEN      bytes received in all             -                 END has arrived, and all before it
    BYE       bytes consumed in all             -                 I take no more DATA
    RESET     0                                 reason, as text: the stream is broken off
    PING      0                                 -                 shows the sender whether the peer is there

`window` is the number of unconsumed bytes that a receiver accepts, at least CHUNK. A sender keeps within it, which
bounds ZeroMQ's queues and ours. Everything that a peer sends is checked against this table.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

MAGIC: Final = b"migfw-zmq"
VERSION: Final = 1
CHUNK: Final = 512 << 10
WINDOW: Final = 8 << 20
CREDIT_STEP: Final = WINDOW // 8
"""A receiver sends CREDIT each time it has consumed this many bytes."""

TEXT_LIMIT: Final = 256

_HEADER: Final = Struct(">BQ")
_GREETING: Final = MAGIC + bytes([VERSION])


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    DATA = 4
    CREDIT = 5
    END = 6
    SEEN = 7
    BYE = 8
    RESET = 9
    PING = 10


PAYLOADS: Final[dict[Kind, tuple[int, int]]] = {
    Kind.HELLO: (1, 64),
    Kind.WELCOME: (1, 64),
    Kind.REFUSE: (0, TEXT_LIMIT),
    Kind.DATA: (1, CHUNK),
    Kind.CREDIT: (0, 0),
    Kind.END: (0, 0),
    Kind.SEEN: (0, 0),
    Kind.BYE: (0, 0),
    Kind.RESET: (0, TEXT_LIMIT),
    Kind.PING: (0, 0),
}
"""Allowed lengths of each kind's payload."""


class ProtocolError(Exception):
    """The peer violated the protocol."""


class Message(NamedTuple):
    """A parsed message. `payload` is bytes, or a buffer that ZeroMQ owns."""

    kind: Kind
    argument: int = 0
    payload: bytes | memoryview = b""


def read_message(parts: list[memoryview]) -> Message:
    """Raises ProtocolError."""
    if not 1 <= len(parts) <= 2 or len(parts[0]) != _HEADER.size:
        raise ProtocolError("not a migfw message")
    number, argument = _HEADER.unpack(parts[0])
    payload = parts[1] if len(parts) == 2 else b""
    try:
        kind = Kind(number)
    except ValueError:
        raise ProtocolError(f"a message of the unknown kind {number}") from None
    least, most = PAYLOADS[kind]
    if not least <= len(payload) <= most:
        raise ProtocolError(f"{kind.name} with {len(payload)} bytes, expected {least} to {most}")
    return Message(kind, argument, payload)


def write_header(message: Message) -> bytes:
    return _HEADER.pack(message.kind, message.argument)


def greeting(kind: Kind) -> Message:
    """Make a HELLO or WELCOME."""
    return Message(kind, WINDOW, _GREETING)


def read_greeting(message: Message, expected: Kind) -> int:
    """Parse a greeting and return the peer's window. Raises ProtocolError."""
    payload = bytes(message.payload)
    if message.kind is not expected or payload[:-1] != MAGIC:
        raise ProtocolError(f"{message.kind.name} instead of {expected.name}")
    if payload[-1] != VERSION:
        raise ProtocolError(f"version {payload[-1]} of the protocol, expected {VERSION}")
    if message.argument < CHUNK:
        raise ProtocolError(f"a window of {message.argument} bytes, expected at least {CHUNK}")
    return message.argument


def text(message: Message) -> str:
    """The payload of REFUSE or RESET as printable text."""
    words = bytes(message.payload).decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in words)
