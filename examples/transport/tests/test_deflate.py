"""deflate: keeps the contract, compresses, and does not believe its peer."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
from migfw_deflate import DeflateChannel, DeflateTransport

from corefw.channel import Channel, Interrupt, receive_exactly
from corefw.errors import ChannelError
from corefw.net.dialing import connect_tcp
from corefw.testing.transport import TransportCase, applicable, check_transport
from corefw.uri import MigrationUri, split_host_port

CASE = TransportCase(
    transport=DeflateTransport,
    listen=lambda: "deflate:127.0.0.1:0",
    wrong=("deflate:nohost", "deflate:host:port"),
    refused="deflate:127.0.0.1:1",
    stream_bytes=8 << 20,  # compressing takes its time
)

NEVER = Interrupt()
"""An interrupt that nobody sets."""


@pytest.mark.parametrize("check", applicable(CASE))
def test_contract(check: str) -> None:
    check_transport(CASE, only=[check])


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """A plain TCP channel, and the deflate channel that it is connected to."""
    with (
        DeflateTransport(MigrationUri.parse("deflate:127.0.0.1:0")).listen() as listener,
        connect_tcp(*split_host_port(listener.uri.rest, "test"), listener.uri, NEVER) as plain,
        listener.accept(NEVER) as channel,
    ):
        yield plain, channel


def test_it_compresses(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    channel.send(bytes(1 << 20))
    channel.send_eof()
    room, count = memoryview(bytearray(1 << 20)), 0
    while got := plain.receive_into(room[count:]):
        count += got
    assert count < 10_000
    assert zlib.decompress(room[:count]) == bytes(1 << 20)


def test_a_bomb_is_inflated_as_it_is_asked_for(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    plain.send(zlib.compress(bytes(64 << 20)))
    plain.send_eof()
    room = memoryview(bytearray(4096))
    receive_exactly(channel, room)
    assert channel.wait_readable(10)
    assert isinstance(channel, DeflateChannel)
    assert len(channel._ready) + len(channel._compressed) < 1 << 20


def test_what_is_not_zlib_is_refused(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    plain.send(b"GET / HTTP/1.1\r\n\r\n")
    for _ in range(2):
        with pytest.raises(ChannelError, match="not compressed as it should be"):
            channel.receive_into(memoryview(bytearray(10)))


def test_an_end_without_the_mark_is_a_cut(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    plain.send(zlib.compress(b"all of it")[:-1])
    plain.send_eof()
    receive_exactly(channel, memoryview(bytearray(9)))
    for _ in range(2):
        with pytest.raises(ChannelError, match="in the middle of the stream"):
            channel.receive_into(memoryview(bytearray(10)))
