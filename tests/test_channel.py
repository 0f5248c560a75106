"""The code in the channel interface: filling a view, and closing at the end of a block."""

import pytest

from corefw.channel import (
    Buffer,
    Channel,
    Interrupt,
    Listener,
    Transport,
    TransportContext,
    TransportFeatures,
    receive_exactly,
)
from corefw.errors import ChannelClosed, ChannelError, UriError
from corefw.uri import MigrationUri


class Pieces(Channel):
    """A channel that receives one piece at a time."""

    peer = "pieces:there"
    has_return_path = False

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.closed = 0

    def send(self, *parts: Buffer) -> None:
        raise ChannelError("one-way")

    def receive_into(self, view: memoryview) -> int:
        if not self.pieces:
            return 0
        piece = self.pieces.pop(0)
        taken = piece[: len(view)]
        view[: len(taken)] = taken
        if piece[len(taken) :]:
            self.pieces.insert(0, piece[len(taken) :])
        return len(taken)

    def wait_readable(self, seconds: float) -> bool:
        return True

    def send_eof(self) -> None:
        raise ChannelError("one-way")

    def abort(self) -> None:
        self.pieces.clear()

    def close(self) -> None:
        self.closed += 1


def test_a_view_is_filled_from_many_pieces() -> None:
    channel = Pieces(b"a", b"bcd", b"efgh")
    view = memoryview(bytearray(6))
    receive_exactly(channel, view)
    assert bytes(view) == b"abcdef"
    receive_exactly(channel, view[:0])
    assert channel.pieces == [b"gh"]


def test_an_end_that_comes_too_early_says_how_much_is_missing() -> None:
    with pytest.raises(ChannelClosed, match="pieces:there ended the stream 2 bytes too early"):
        receive_exactly(Pieces(b"abc"), memoryview(bytearray(5)))


def test_a_channel_is_closed_at_the_end_of_its_block_also_when_that_fails() -> None:
    channel = Pieces()
    with channel as entered:
        assert entered is channel
    with pytest.raises(RuntimeError), channel:
        raise RuntimeError
    assert channel.closed == 2


class Pigeon(Transport):
    """A transport for one direction, or none."""

    def __init__(self, *, incoming: bool, outgoing: bool) -> None:
        super().__init__(MigrationUri("pigeon", "loft"), TransportContext())
        self.features = TransportFeatures(False, False, incoming=incoming, outgoing=outgoing)

    def connect(self, interrupt: Interrupt) -> Channel:
        raise ChannelError("lost")

    def listen(self) -> Listener:
        raise ChannelError("lost")


def test_a_transport_says_which_end_it_cannot_be() -> None:
    both = Pigeon(incoming=True, outgoing=True)
    both.check_incoming()
    both.check_outgoing()
    neither = Pigeon(incoming=False, outgoing=False)
    with pytest.raises(UriError, match=r"^'pigeon:loft': it can only send a migration, not receive one$"):
        neither.check_incoming()
    with pytest.raises(UriError, match=r"^'pigeon:loft': it can only receive a migration, not send one$"):
        neither.check_outgoing()
