"""corefw.channel: what it does itself."""

from __future__ import annotations

import pytest

from corefw.channel import Buffer, Channel, receive_exactly
from corefw.errors import ChannelClosed, ChannelError


class Scripted(Channel):
    """Receives what it was given, one piece at a time, and then the end."""

    peer = "test:peer"
    has_return_path = False

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.closed = 0

    def receive_into(self, view: memoryview) -> int:
        if not self.pieces:
            return 0
        piece = self.pieces.pop(0)
        count = min(len(piece), len(view))
        view[:count] = piece[:count]
        if piece[count:]:
            self.pieces.insert(0, piece[count:])
        return count

    def send(self, *parts: Buffer) -> None:
        raise ChannelError("one way")

    def wait_readable(self, seconds: float) -> bool:
        return True

    def send_eof(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


def test_receive_exactly_takes_no_more_than_it_was_asked_for() -> None:
    channel, room = Scripted(b"ab", b"c", b"defg"), bytearray(5)
    receive_exactly(channel, memoryview(room))
    assert room == b"abcde"
    assert channel.pieces == [b"fg"]
    receive_exactly(channel, memoryview(bytearray()))


def test_receive_exactly_says_how_much_is_missing() -> None:
    with pytest.raises(ChannelClosed, match="test:peer ended the stream 7 bytes too early"):
        receive_exactly(Scripted(b"abc"), memoryview(bytearray(10)))


def test_with_closes_also_after_an_error() -> None:
    channel = Scripted()
    with pytest.raises(ZeroDivisionError), channel:
        raise ZeroDivisionError
    assert channel.closed == 1
