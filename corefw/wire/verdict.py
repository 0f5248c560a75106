"""What a destination says of the outcome, overheard on its return path by somebody in the middle.

The law: it only listens, and keeps eight bytes at most. Whatever is no return path, or of a kind that is not known
here, says nothing: then there is no verdict.
"""

from __future__ import annotations

from enum import StrEnum
from struct import Struct
from typing import Final

from corefw.channel import Buffer
from corefw.wire.constants import RETURN_MESSAGE_LENGTHS, RETURN_MESSAGE_LIMIT, ReturnMessage
from corefw.wire.returnpath import parse_number

_HEAD: Final = Struct(">HH")


class Verdict(StrEnum):
    """The last word so far."""

    UNKNOWN = "unknown"  # nothing was said, or nothing that is understood
    OPEN = "open"  # a return path, on which the end has not been told
    ACCEPTED = "accepted"  # SHUT 0: the destination has the guest
    REFUSED = "refused"  # SHUT with another number: it failed


class Overhearing:
    """Hears the bytes of a return path, in pieces of any size. `verdict` is what they say so far."""

    def __init__(self) -> None:
        self.verdict = Verdict.UNKNOWN
        self._held = bytearray()
        self._wanted = _HEAD.size
        self._to_skip = 0
        self._understood = True

    def hear(self, data: Buffer) -> None:
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
                self._hear_message()

    def _hear_message(self) -> None:
        """A head, or the whole of SHUT."""
        number, length = _HEAD.unpack_from(self._held)
        if len(self._held) > _HEAD.size:
            failed = parse_number(bytes(self._held[_HEAD.size :]))
            self.verdict = Verdict.REFUSED if failed else Verdict.ACCEPTED
        elif not _understood(number, length):
            self._understood = False
            self.verdict = Verdict.UNKNOWN
        elif number == ReturnMessage.SHUT:
            self._wanted = _HEAD.size + length
            return
        else:
            self.verdict = Verdict.OPEN
            self._to_skip = length
        self._held.clear()
        self._wanted = _HEAD.size


def _understood(number: int, length: int) -> bool:
    """Not RECV_BITMAP: what follows it is no message."""
    if number not in RETURN_MESSAGE_LENGTHS or number == ReturnMessage.RECV_BITMAP:
        return False
    expected = RETURN_MESSAGE_LENGTHS[ReturnMessage(number)]
    return length <= RETURN_MESSAGE_LIMIT if expected is None else length == expected
