"""The points of a migration at which a fault can be placed: its messages, in both directions.

A message is recognized by its first bytes, which the guest of the matrix does not have in its RAM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from corefw.engine.identity import Purpose
from corefw.wire.constants import (
    MIGFW_PING,
    PACKAGE_PING,
    READY_PING,
    Command,
    ReturnMessage,
    SectionType,
)

FOOTER: Final = bytes((SectionType.FOOTER,)) + b"...."


class Stage(StrEnum):
    """The phase of the migration in which the fault happens."""

    PRECOPY = "precopy"
    POSTCOPY = "postcopy"
    RECOVERY = "recovery"


@dataclass(frozen=True, slots=True)
class Point:
    """A place for a fault: before or within a message, after some number of bytes, or when the source has a status.

    forward       the message goes to the destination
    pattern       matches at the message's first byte
    skip          bytes of the message that still pass; without a pattern, bytes of the connection
    status        of the source
    alone         what breaks is the channel of requested pages, which is the newest connection; else all of them
    handed_over   the source may have sent what lets the destination start the guest: sockets hold a lot
    """

    stage: Stage
    name: str
    forward: bool
    pattern: re.Pattern[bytes] | None
    skip: int = 0
    handed_over: bool = False
    status: str = ""
    alone: bool = False


def _bytes(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


def _command(command: Command, body: bytes | None = None) -> re.Pattern[bytes]:
    head = bytes((SectionType.COMMAND, 0, command))
    return _bytes(re.escape(head if body is None else head + len(body).to_bytes(2) + body))


def _ping(number: int) -> re.Pattern[bytes]:
    return _command(Command.PING, number.to_bytes(4))


def _message(message: ReturnMessage, body: bytes = b"") -> re.Pattern[bytes]:
    length = len(body).to_bytes(2) if body else b""
    return _bytes(re.escape(message.to_bytes(2) + length + body))


def pong(number: int) -> re.Pattern[bytes]:
    return _message(ReturnMessage.PONG, number.to_bytes(4))


def _section(kind: SectionType) -> re.Pattern[bytes]:
    """A section that follows another one; that one's footer is not part of the match."""
    return _bytes(b"(?<=" + FOOTER + b")" + re.escape(bytes((kind,))))


START: Final = _bytes(re.escape(bytes((SectionType.START,))) + rb"....\x03ram")
SHUT: Final = _bytes(re.escape(ReturnMessage.SHUT.to_bytes(2) + b"\0\4" + bytes(4)) + rb"\Z")
"""SHUT 0. It comes last; page requests may have the same bytes in the middle."""
RESUME_ACK: Final = _message(ReturnMessage.RESUME_ACK)

MESSAGES: Final[tuple[Point, ...]] = (
    Point(Stage.PRECOPY, "header", True, _bytes(b"QEVM")),
    Point(Stage.PRECOPY, "OPEN_RETURN_PATH", True, _command(Command.OPEN_RETURN_PATH, b"")),
    Point(Stage.PRECOPY, "START", True, START),
    Point(Stage.PRECOPY, "PING (ready)", True, _ping(READY_PING)),
    Point(Stage.PRECOPY, "PONG (migfw)", False, pong(MIGFW_PING)),
    Point(Stage.PRECOPY, "PONG (ready)", False, pong(READY_PING)),
    Point(Stage.PRECOPY, "PART", True, _section(SectionType.PART)),
    Point(Stage.PRECOPY, "END", True, _section(SectionType.END), handed_over=True),
    Point(Stage.PRECOPY, "FULL", True, _section(SectionType.FULL), handed_over=True),
    Point(Stage.PRECOPY, "EOF", True, _section(SectionType.EOF), handed_over=True),
    Point(Stage.PRECOPY, "SHUT 0", False, SHUT, handed_over=True),
    Point(Stage.POSTCOPY, "POSTCOPY_ADVISE", True, _command(Command.POSTCOPY_ADVISE)),
    Point(Stage.POSTCOPY, "RAM_DISCARD", True, _command(Command.POSTCOPY_RAM_DISCARD), handed_over=True),
    Point(Stage.POSTCOPY, "PACKAGED", True, _command(Command.PACKAGED), handed_over=True),
    Point(Stage.POSTCOPY, "PACKAGED, half of it", True, _command(Command.PACKAGED), skip=64, handed_over=True),
    Point(Stage.POSTCOPY, "RUN", True, _command(Command.POSTCOPY_RUN, b""), handed_over=True),
    Point(Stage.POSTCOPY, "PONG 3", False, pong(PACKAGE_PING), handed_over=True),
    Point(Stage.POSTCOPY, "REQ_PAGES", False, _message(ReturnMessage.REQ_PAGES_ID), handed_over=True),
    Point(Stage.POSTCOPY, "END", True, _section(SectionType.END), handed_over=True),
    Point(Stage.POSTCOPY, "SHUT 0", False, SHUT, handed_over=True),
    Point(Stage.RECOVERY, "RECV_BITMAP", True, _command(Command.RECV_BITMAP), handed_over=True),
    Point(Stage.RECOVERY, "RECV_BITMAP (answer)", False, _message(ReturnMessage.RECV_BITMAP), handed_over=True),
    Point(Stage.RECOVERY, "RESUME", True, _command(Command.POSTCOPY_RESUME), handed_over=True),
    Point(Stage.RECOVERY, "RESUME_ACK", False, RESUME_ACK, handed_over=True),
    Point(Stage.RECOVERY, "END", True, _section(SectionType.END), handed_over=True),
    Point(Stage.RECOVERY, "SHUT 0", False, SHUT, handed_over=True),
)
"""For transports whose bytes are those of the stream."""


def _at_byte(stage: Stage, count: int, *, handed_over: bool) -> Point:
    return Point(stage, f"byte {count}", True, None, skip=count, handed_over=handed_over)


BYTES: Final[tuple[Point, ...]] = (
    _at_byte(Stage.PRECOPY, 40, handed_over=False),
    _at_byte(Stage.PRECOPY, 1 << 20, handed_over=True),
    _at_byte(Stage.POSTCOPY, 3 << 20, handed_over=True),
    _at_byte(Stage.RECOVERY, 5000, handed_over=True),
)
"""For transports that wrap or encrypt the stream."""


def _at_status(stage: Stage, status: str, *, handed_over: bool = False, alone: bool = False) -> Point:
    return Point(stage, f"status {status}", True, None, handed_over=handed_over, status=status, alone=alone)


STATUSES: Final[tuple[Point, ...]] = (
    _at_status(Stage.PRECOPY, "active"),
    _at_status(Stage.PRECOPY, "pre-switchover"),
    _at_status(Stage.POSTCOPY, "postcopy-active", handed_over=True),
    _at_status(Stage.RECOVERY, "postcopy-active", handed_over=True),
)
"""For every transport."""

PAUSED: Final = _at_status(Stage.RECOVERY, "postcopy-paused", handed_over=True)
"""While the migration is paused there is no connection to break."""

_PROOF: Final = _bytes(Purpose.REQUESTED.value)
REQUESTED: Final[tuple[Point, ...]] = (
    Point(Stage.POSTCOPY, "MGRP", True, _PROOF, alone=True),
    Point(Stage.POSTCOPY, "REQ_PAGES", False, _message(ReturnMessage.REQ_PAGES_ID), handed_over=True),
    Point(Stage.POSTCOPY, "SHUT 0", False, SHUT, handed_over=True),
    _at_status(Stage.POSTCOPY, "postcopy-active", handed_over=True, alone=True),
    Point(Stage.RECOVERY, "MGRP", True, _PROOF, handed_over=True, alone=True),
    Point(Stage.RECOVERY, "RESUME_ACK", False, RESUME_ACK, handed_over=True),
    _at_status(Stage.RECOVERY, "postcopy-active", handed_over=True, alone=True),
)
"""Where requested pages have a channel of their own."""
