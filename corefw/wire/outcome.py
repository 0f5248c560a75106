"""The outcome that a destination reports on its return path, read by a relay that forwards it.

It holds eight bytes at most. If the bytes are not a return path, or hold a message of an unknown type, the outcome is
unknown.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from corefw.channel import Buffer
from corefw.wire.constants import PLUGIN_MESSAGES, RETURN_MESSAGE_LENGTHS, RETURN_MESSAGE_LIMIT, ReturnMessage
from corefw.wire.returnpath import HEADER, parse_number


class Outcome(StrEnum):
    """The outcome so far."""

    UNKNOWN = "unknown"
    """No message, or one that is not understood."""

    OPEN = "open"
    """There is a return path, and SHUT has not arrived."""

    ACCEPTED = "accepted"
    """SHUT 0: the destination has the guest."""

    REFUSED = "refused"
    """SHUT with another number: the destination failed to load the guest."""


class OutcomeMonitor:
    """Parses the bytes of a return path, in pieces of any size. `outcome` is what they say so far."""

    def __init__(self) -> None:
        self.outcome = Outcome.UNKNOWN
        self._held = bytearray()
        self._wanted: int = HEADER.size
        self._to_skip = 0
        self._understood = True

    def feed(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        while self._understood and len(rest):
            if self._to_skip:
                skipped = min(self._to_skip, len(rest))
                self._to_skip -= skipped
                rest = rest[skipped:]
                continue
            taken = min(self._wanted - len(self._held), len(rest))
            self._held += rest[:taken]
            rest = rest[taken:]
            if len(self._held) == self._wanted:
                self._read()

    def _read(self) -> None:
        """Read a header, or SHUT with its body."""
        number, length = HEADER.unpack_from(self._held)
        if len(self._held) > HEADER.size:
            failed = parse_number(bytes(self._held[HEADER.size :]))
            self.outcome = Outcome.REFUSED if failed else Outcome.ACCEPTED
        elif not _is_message(number, length):
            self._understood = False
            self.outcome = Outcome.UNKNOWN
        elif number == ReturnMessage.SHUT:
            self._wanted = HEADER.size + length
            return
        else:
            self.outcome = Outcome.OPEN
            self._to_skip = length
        self._held.clear()
        self._wanted = HEADER.size


_FOLLOWED_BY_OTHER_BYTES: Final = ReturnMessage.RECV_BITMAP
"""The bitmap behind this message is not a message."""


def _is_message(number: int, length: int) -> bool:
    if number in PLUGIN_MESSAGES:
        return length <= RETURN_MESSAGE_LIMIT
    if number not in RETURN_MESSAGE_LENGTHS or number == _FOLLOWED_BY_OTHER_BYTES:
        return False
    expected = RETURN_MESSAGE_LENGTHS[ReturnMessage(number)]
    return length <= RETURN_MESSAGE_LIMIT if expected is None else length == expected
