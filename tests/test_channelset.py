"""Channels that end together, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from corefw.errors import Interrupted
from corefw.net.channelset import ChannelSet
from corefw.net.sockets import SocketChannel


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pair(stack: ExitStack) -> tuple[SocketChannel, SocketChannel]:
    here, there = socket.socketpair()
    return stack.enter_context(SocketChannel(here, "there")), stack.enter_context(SocketChannel(there, "here"))


def test_abort_reaches_the_channels_that_are_there_and_those_that_come_later(stack: ExitStack) -> None:
    channels = ChannelSet()
    (first, _), (late, _) = pair(stack), pair(stack)
    assert channels.add(first) is first
    channels.abort()
    assert channels.add(late) is late
    for channel in (first, late):
        with pytest.raises(Interrupted):
            channel.receive_into(memoryview(bytearray(1)))


def test_abort_others_leaves_one_channel_usable(stack: ExitStack) -> None:
    channels = ChannelSet()
    (kept, there), (other, _), (late, _) = pair(stack), pair(stack), pair(stack)
    channels.add(kept)
    channels.add(other)
    channels.abort_others(kept)
    channels.add(late)
    for channel in (other, late):
        with pytest.raises(Interrupted):
            channel.receive_into(memoryview(bytearray(1)))
    kept.send(b"x")
    assert there.receive_into(memoryview(bytearray(1))) == 1


def test_close_ends_every_channel_even_one_that_was_closed_before(stack: ExitStack) -> None:
    channels = ChannelSet()
    pairs = [pair(stack) for _ in range(2)]
    for here, _ in pairs:
        channels.add(here)
    pairs[0][0].close()
    channels.close()
    for _, there in pairs:
        assert there.receive_into(memoryview(bytearray(1))) == 0, "the peer sees the end"
