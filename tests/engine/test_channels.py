"""Channels that a section opens beside the stream, over real sockets: counted and paced together with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest

from corefw.channel import Channel, receive_exactly
from corefw.errors import Interrupted, MachineError
from corefw.plugins import Plugins
from corefw.section import IncomingContext, MultiChannelLoader, OutgoingContext, Pending
from corefw.wire.stream import StreamReader, StreamWriter
from tests.engine.test_plugin_sections import Loader, Plugin, Saver
from tests.helpers.engines import Pair, arrived, ended, query_migrate, runs_on

CHANNELS = 2
CHUNK = 32 << 10
CHUNKS = 16
"""Chunks per channel."""
BYTES = CHANNELS * CHUNKS * CHUNK


class StripedSaver(Saver):
    """Sends its data over two channels at once, each from a thread of its own. The stream carries empty PARTs."""

    def __init__(self) -> None:
        self._left = CHUNKS

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self._channels = [context.open_channel() for _ in range(CHANNELS)]
        for number, channel in enumerate(self._channels):
            channel.send(bytes([number]))

    def pending_estimate(self) -> Pending:
        return Pending(self._left * CHUNK * CHANNELS, 0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        if self._left:
            chunk = bytes([self._left]) * CHUNK
            threads = [threading.Thread(target=channel.send, args=(chunk,)) for channel in self._channels]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self._left -= 1
        return not self._left


class StripedLoader(Loader, MultiChannelLoader):
    received: ClassVar[list[bytes]] = []

    def __init__(self) -> None:
        self._channels: list[Channel] = []

    def takes_channels(self) -> bool:
        return True

    def setup(self, context: IncomingContext) -> None:
        self._context = context

    def load(self, reader: StreamReader, version_id: int) -> None:
        if not self._channels:
            self._channels = [self._context.accept_channel() for _ in range(CHANNELS)]
            self._receiving = [threading.Thread(target=self._receive, args=(one,)) for one in self._channels]
            for thread in self._receiving:
                thread.start()

    def _receive(self, channel: Channel) -> None:
        view = memoryview(bytearray(1 + CHUNKS * CHUNK))
        with suppress(Interrupted):
            receive_exactly(channel, view)
            StripedLoader.received.append(bytes(view))

    def cleanup(self) -> None:
        for thread in self._receiving:
            thread.join()


@pytest.fixture
def pair() -> Iterator[Pair]:
    plugins = Plugins.load()
    plugins.register(Plugin(StripedSaver, StripedLoader), "striped")
    with Pair(plugins) as pair:
        yield pair


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_channels_beside_the_stream_are_counted_and_paced_with_it(pair: Pair, folder: Path, scheme: str) -> None:
    limit = 4 << 20
    StripedLoader.received = []
    source, destination = pair.source(running=False), pair.destination()
    source.set_parameters({"max-bandwidth": limit, "downtime-limit": 0})
    uri = destination.migrate_incoming("tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{folder}/socket")
    source.migrate(uri)
    assert (ended(source), arrived(destination)) == ("completed", "completed"), query_migrate(destination)
    data = b"".join(bytes([number]) * CHUNK for number in range(CHUNKS, 0, -1))
    assert sorted(StripedLoader.received) == [bytes([number]) + data for number in range(CHANNELS)]
    info = query_migrate(source)
    ram = info["ram"]
    assert ram["transferred"] > BYTES and ram["precopy-bytes"] > BYTES
    assert ram["mbps"] == pytest.approx(ram["transferred"] * 8 / info["total-time"] / 1000)
    assert info["total-time"] >= 1000 * BYTES / limit * 0.95, "they share one limit"
    assert info["x-migfw"]["sections"]["side"]["sent"] < BYTES, "in the stream itself"


class FailingLoader(StripedLoader):
    """Fails while its threads wait for the channels; its cleanup() joins them."""

    def load(self, reader: StreamReader, version_id: int) -> None:
        super().load(reader, version_id)
        raise MachineError("no room for this section")


def test_a_load_that_fails_ends_the_channels_before_the_cleanup() -> None:
    plugins = Plugins.load()
    plugins.register(Plugin(StripedSaver, FailingLoader), "striped")
    with Pair(plugins) as pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
        assert "no room for this section" in (source.report().error or "")
        runs_on(source)
