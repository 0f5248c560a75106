"""zstd+: keeps the contract over several transports, compresses, has a level, and does not trust its peer."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import migfw_zstd
import pytest
import zstandard
from migfw_zstd import END, ZstdChannel, ZstdTransport

from corefw.channel import Channel, Interrupt, TransportContext, receive_exactly
from corefw.errors import ChannelError, SettingsError, UriError
from corefw.net.dialing import connect_tcp
from corefw.plugins import Plugins
from corefw.testing.transport import TransportCase, applicable, check_transport
from corefw.uri import MigrationUri, split_host_port

NEVER = Interrupt()
"""An interrupt that is never set."""


def context(level: int | None = None) -> TransportContext:
    """The transports that are installed, and this plugin's parameter."""
    plugins = Plugins()
    plugins.register(migfw_zstd, "zstd")
    settings = plugins.settings()
    if level is not None:
        settings.set_parameters({"x-zstd-level": level})
    return plugins.transport_context(settings)


CONTEXT = context()

CASE = TransportCase(
    transport=ZstdTransport,
    context=CONTEXT,
    listen=lambda: "zstd+tcp:127.0.0.1:0",
    wrong=("zstd:127.0.0.1:4444", "zstd+tcp:nohost", "zstd+nothing:x", "zstd+:x"),
    refused="zstd+tcp:127.0.0.1:1",
    features=CONTEXT.transport("tcp:127.0.0.1:1").features,
    stream_bytes=16 << 20,
)


@pytest.mark.parametrize("check", applicable(CASE))
def test_contract(check: str) -> None:
    check_transport(CASE, only=[check])


def transport(uri: MigrationUri | str, level: int | None = None) -> ZstdTransport:
    parsed = MigrationUri.parse(uri) if isinstance(uri, str) else uri
    return ZstdTransport(parsed, context(level))


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """A plain TCP channel, and the compressing channel that it is connected to."""
    with (
        transport("zstd+tcp:127.0.0.1:0").listen() as listener,
        connect_tcp(*split_host_port(listener.uri.rest, "test"), listener.uri, NEVER) as plain,
        listener.accept(NEVER) as channel,
    ):
        yield plain, channel


def received(channel: Channel) -> bytes:
    """Everything up to the end."""
    got, room = bytearray(), memoryview(bytearray(1 << 20))
    while count := channel.receive_into(room):
        got += room[:count]
    return bytes(got)


def test_it_compresses_and_every_decoder_reads_it(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    channel.send(bytes(1 << 20))
    channel.send_eof()
    got = received(plain)
    assert len(got) < 10_000
    decoder = zstandard.ZstdDecompressor().stream_reader(got, read_across_frames=True)
    assert decoder.read() == bytes(1 << 20)


def test_the_level_is_a_parameter() -> None:
    words = [f"word{number}" for number in range(3000)]
    text = " ".join(random.Random(1).choices(words, k=100_000)).encode()
    sizes = []
    for level in (1, 19):
        with (
            transport("zstd+tcp:127.0.0.1:0").listen() as listener,
            transport(listener.uri, level).connect(NEVER) as channel,
            listener.accept(NEVER) as other,
        ):
            assert isinstance(other, ZstdChannel)
            channel.send(text)
            channel.send_eof()
            sizes.append(len(received(other._inner)))
    assert sizes[1] < sizes[0] < len(text)
    for wrong in (0, 20):
        with pytest.raises(SettingsError, match="'x-zstd-level'"):
            context(wrong)


def test_a_file_holds_what_was_sent(tmp_path: Path) -> None:
    uri = f"zstd+file:{tmp_path}/guest.zst"
    writing = transport(uri)
    with writing.connect(NEVER) as channel:
        channel.send(bytes(1 << 20), b"end")
        channel.send_eof()
    assert writing.features.atomic
    assert (tmp_path / "guest.zst").stat().st_size < 10_000
    with transport(uri).listen() as listener, listener.accept(NEVER) as channel:
        assert received(channel) == bytes(1 << 20) + b"end"


def test_it_can_do_what_the_inner_transport_can() -> None:
    one_way = transport("zstd+exec:cat")
    assert not one_way.features.return_path
    port_0 = transport("zstd+tcp:127.0.0.1:0")
    with pytest.raises(UriError, match="port 0"):
        port_0.check_outgoing()
    port_0.check_incoming()


def test_a_bomb_is_decompressed_as_it_is_asked_for(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    bomb = zstandard.compress(bytes(256 << 20))
    assert len(bomb) < migfw_zstd.ROOM, "all of it is received at once"
    plain.send(bomb, END)
    plain.send_eof()
    assert channel.wait_readable(10)
    assert isinstance(channel, ZstdChannel)
    assert len(channel._ready) <= migfw_zstd.ROOM
    receive_exactly(channel, memoryview(bytearray(1 << 20)))


def test_frames_without_content_do_not_make_a_wait_longer(ends: tuple[Channel, Channel]) -> None:
    """A peer that keeps sending empty frames counts as silent."""
    plain, channel = ends

    def flood() -> None:
        with suppress(ChannelError):
            while True:
                plain.send(END * 1000)

    sender = threading.Thread(target=flood)
    sender.start()
    try:
        assert not any(channel.wait_readable(seconds) for seconds in (0.0, 0.1))
    finally:
        channel.abort()
        plain.abort()
        sender.join()


def test_a_window_that_needs_much_memory_is_refused(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    long = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    plain.send(zstandard.ZstdCompressor(compression_params=long).compressobj().compress(b"x" * (32 << 20)))
    with pytest.raises(ChannelError, match="not valid zstd"):
        channel.receive_into(memoryview(bytearray(10)))


def test_what_is_not_zstd_is_refused(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    plain.send(b"GET / HTTP/1.1\r\n\r\n")
    for _ in range(2):
        with pytest.raises(ChannelError, match="not valid zstd"):
            channel.receive_into(memoryview(bytearray(10)))


@pytest.mark.parametrize("cut", [1, len(END), len(END) + 1])
def test_an_end_without_the_mark_is_a_cut(ends: tuple[Channel, Channel], cut: int) -> None:
    plain, channel = ends
    plain.send((zstandard.compress(b"all of it") + END)[:-cut])
    plain.send_eof()
    for _ in range(2):
        with pytest.raises(ChannelError, match="in the middle of the stream"):
            received(channel)


def test_bytes_behind_the_end_are_refused(ends: tuple[Channel, Channel]) -> None:
    plain, channel = ends
    plain.send(zstandard.compress(b"all of it"), END, b"more")
    plain.send_eof()
    with pytest.raises(ChannelError):
        received(channel)
