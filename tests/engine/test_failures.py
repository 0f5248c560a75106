"""Cancels and failures in every state: the guest continues at the source unless the destination may be running it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corefw.channel import Channel, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.engine import Engine
from corefw.hookspecs import hookimpl
from corefw.machine import RunState
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.uri import MigrationUri
from corefw.wire.constants import ReturnMessage
from tests.helpers.engines import PATIENCE, Pair, Peer, arrived, counting, ended, query_migrate, runs_on
from tests.helpers.machines import CountingMachine

END_OF_DESCRIPTION = b"}]}"
"""The last bytes of a stream with a description."""


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


def big() -> CountingMachine:
    """More RAM than socket buffers hold: a peer that does not read keeps the source busy."""
    machine = CountingMachine(pages=8192)
    machine.block.pages[:, 8:] = 1
    return machine


def reached(engine: Engine, status: str) -> None:
    assert engine.outgoing.wait(frozenset({MigrationStatus(status)}), PATIENCE), engine.outgoing.status


class StuckTransport(Transport):
    """Never connects, like a transport to a host that does not answer."""

    features = TransportFeatures(return_path=True, multi_channel=False)

    def connect(self, interrupt: Interrupt) -> Channel:
        interrupt.wait(None)
        interrupt.check()
        raise AssertionError

    def listen(self) -> Listener:
        raise AssertionError


class StuckPlugin:
    @hookimpl
    def corefw_transport(self, uri: MigrationUri, context: TransportContext) -> Transport | None:
        return StuckTransport(uri, context) if uri.scheme == "stuck" else None


# -- cancel ------------------------------------------------------------------------------------------------------------


def test_cancel_in_setup() -> None:
    plugins = Plugins.load()
    plugins.register(StuckPlugin())
    with Pair(plugins) as pair:
        source = pair.source()
        source.migrate("stuck:anywhere")
        assert source.outgoing.status == "setup"
        source.cancel()
        assert ended(source) == "cancelled"
        assert pair.statuses("cancelled") == ["setup", "cancelling", "cancelled"]
        runs_on(source)


def test_cancel_in_active(pair: Pair, peer: Peer) -> None:
    source = pair.source(big())
    source.migrate(peer.uri)
    peer.accept()
    reached(source, "active")
    source.cancel()
    assert ended(source) == "cancelled"
    assert pair.statuses("cancelled") == ["setup", "active", "cancelling", "cancelled"]
    runs_on(source)


def test_cancel_in_pre_switchover(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    reached(source, "pre-switchover")
    source.cancel()
    assert ended(source) == "cancelled"
    runs_on(source)
    assert arrived(destination) == "failed" and counting(destination).starts == 0


def test_cancel_in_device(pair: Pair, peer: Peer) -> None:
    """The peer hangs after the guest was stopped, before it has everything."""
    machine = big()
    source = pair.source(machine)
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(peer.uri)
    peer.accept()
    reading = threading.Thread(target=peer.read_while, args=(lambda: source.outgoing.status != "pre-switchover",))
    reading.start()
    reached(source, "pre-switchover")
    reading.join()
    machine.block.pages[:, 100] += 1  # as if the guest had written all of its RAM just before it stopped
    source.continue_migration(MigrationStatus.PRE_SWITCHOVER)
    reached(source, "device")
    source.cancel()
    assert ended(source) == "cancelled"
    assert pair.statuses("cancelled")[-3:] == ["device", "cancelling", "cancelled"]
    runs_on(source)


def test_cancel_while_the_destination_may_run_the_guest(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.migrate(peer.uri)
    peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    source.cancel()
    assert ended(source) == "cancelled"
    assert source.machine.run_state is RunState.POSTMIGRATE
    assert "may be running the guest" in query_migrate(source)["x-migfw"]["reason"]
    assert "error-desc" not in query_migrate(source)
    source.cont()  # the user knows that it does not run there
    runs_on(source)


def test_cancel_of_nothing(pair: Pair) -> None:
    source = pair.source()
    source.cancel()
    assert source.outgoing.status == "none"
    runs_on(source)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_nobody_listens(pair: Pair) -> None:
    source = pair.source()
    source.migrate("tcp:127.0.0.1:1")
    assert ended(source) == "failed"
    assert pair.statuses("failed") == ["setup", "failing", "failed"]
    runs_on(source)


def test_the_peer_goes_away_in_active(pair: Pair, peer: Peer) -> None:
    source = pair.source(big())
    source.migrate(peer.uri)
    peer.accept().close()
    assert ended(source) == "failed"
    runs_on(source)


def test_the_peer_goes_away_in_pre_switchover(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(peer.uri)
    connection = peer.accept()
    reached(source, "pre-switchover")
    connection.close()
    assert ended(source) == "failed"
    runs_on(source)


def test_the_destination_says_that_it_failed(pair: Pair, peer: Peer) -> None:
    """After everything was sent, only the destination's answer allows the guest to continue here."""
    source = pair.source()
    source.migrate(peer.uri)
    peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    peer.say(ReturnMessage.SHUT, 1)
    assert ended(source) == "failed"
    assert "the destination failed to load the guest" in query_migrate(source)["error-desc"]
    runs_on(source)


def test_the_destination_vanishes_when_it_may_run_the_guest(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.migrate(peer.uri)
    connection = peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    connection.close()
    assert ended(source) == "failed"
    assert source.machine.run_state is RunState.POSTMIGRATE
    assert "may be running the guest" in query_migrate(source)["error-desc"]
    assert counting(source).starts == 1


def test_shut_0_after_a_cancel_that_came_too_late(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.migrate(peer.uri)
    peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    peer.say(ReturnMessage.SHUT, 0)
    assert ended(source) == "completed"
    source.cancel()
    assert source.outgoing.status == "completed" and counting(source).starts == 1


@pytest.mark.parametrize(
    ("message", "reported"),
    [
        (b"\x00\x09\x00\x00", "type 9"),
        (b"\x00\x01\x00\x02\x00\x00", "4 bytes of body for message SHUT"),
        (b"\x00\x04\x00\x0c" + bytes(12), "unexpected REQ_PAGES"),
    ],
)
def test_nonsense_on_the_return_path(pair: Pair, peer: Peer, message: bytes, reported: str) -> None:
    source = pair.source(big())
    source.migrate(peer.uri)
    peer.accept().sendall(message)
    assert ended(source) == "failed"
    assert reported in query_migrate(source)["error-desc"]
    runs_on(source)


def test_the_guest_dies(pair: Pair, peer: Peer) -> None:
    source = pair.source(big())
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.migrate(peer.uri)
    peer.accept()
    reached(source, "active")
    counting(source).die()
    assert ended(source) == "failed"
    assert "the guest ended" in query_migrate(source)["error-desc"]


def test_a_full_disk(pair: Pair) -> None:
    source = pair.source()
    source.set_capabilities({"return-path": False})
    source.migrate("file:/dev/full")
    assert ended(source) == "failed"
    assert "No space left" in query_migrate(source)["error-desc"].replace("no space", "No space")
    runs_on(source)


# -- destinations that differ ------------------------------------------------------------------------------------------


def newer() -> CountingMachine:
    from dataclasses import replace

    from tests.helpers.machines import COUNTER

    return CountingMachine(table=replace(COUNTER, version_id=3, minimum_version_id=3))


DIFFERENT: list[tuple[str, Callable[[], CountingMachine], Callable[[], CountingMachine], tuple[str, ...]]] = [
    (
        "machine",
        CountingMachine,
        lambda: CountingMachine(incoming=True, name="other"),
        ("configuration", "machine 'other'", "'counting'"),
    ),
    (
        "ram-size",
        CountingMachine,
        lambda: CountingMachine(128, incoming=True),
        ("'ram'", f"{128 * 4096} bytes", f"{64 * 4096} bytes"),
    ),
    (
        "ram-block",
        CountingMachine,
        lambda: CountingMachine(incoming=True, block="other"),
        ("'ram'", "blocks other", "block 'counters'"),
    ),
    (
        "missing-section",
        CountingMachine,
        lambda: CountingMachine(incoming=True, instances=2),
        ("section 'counter' (instance 1)", "the end of the stream"),
    ),
    (
        "unknown-section",
        lambda: CountingMachine(instances=2),
        lambda: CountingMachine(incoming=True),
        ("expected one of the sections ", "got section 'counter' (instance 1)"),
    ),
    ("version", newer, lambda: CountingMachine(incoming=True), ("'counter'", "version from 2 to 2", "version 3")),
]


@pytest.mark.parametrize(
    ("source_machine", "machine", "reported"), [row[1:] for row in DIFFERENT], ids=[row[0] for row in DIFFERENT]
)
def test_a_destination_that_differs(
    pair: Pair,
    source_machine: Callable[[], CountingMachine],
    machine: Callable[[], CountingMachine],
    reported: tuple[str, ...],
) -> None:
    source, destination = pair.source(source_machine()), pair.destination(machine())
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "failed" and arrived(destination) == "failed"
    reason = query_migrate(destination)["error-desc"]
    assert all(part in reason for part in (*reported, "at offset")), reason
    assert counting(destination).starts == 0
    runs_on(source)


def test_a_destination_that_failed_waits_again(pair: Pair, peer: Peer) -> None:
    source, destination = pair.source(), pair.destination()
    with socket.create_connection(address(destination)) as stranger:
        stranger.sendall(b"QEVM and no version")
        assert arrived(destination) == "failed"
    assert "expected version 3" in query_migrate(destination)["error-desc"]
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and destination.incoming.wait(frozenset({MigrationStatus.COMPLETED}), PATIENCE)
    runs_on(destination)


def address(destination: Engine) -> tuple[str, int]:
    host, port = destination.migrate_incoming("tcp:127.0.0.1:0").removeprefix("tcp:").split(":")
    return host, int(port)


def test_closing_a_destination_that_waits(pair: Pair) -> None:
    destination = pair.destination()
    destination.migrate_incoming("tcp:127.0.0.1:0")
    began = time.monotonic()
    destination.close()
    assert destination.incoming.status == "failed" and time.monotonic() - began < PATIENCE


def test_a_file_that_cannot_be_put_in_place_leaves_the_guest_running(pair: Pair, folder: Path) -> None:
    """Everything was written by then, but the file never appeared."""
    source = pair.source()
    source.set_capabilities({"return-path": False, "pause-before-switchover": True})
    source.migrate(f"file:{folder}/stream")
    reached(source, "pre-switchover")
    (folder / "stream").mkdir()
    source.continue_migration(MigrationStatus.PRE_SWITCHOVER)
    assert ended(source) == "failed"
    assert "is a directory" in query_migrate(source)["error-desc"]
    runs_on(source)
    assert [file.name for file in folder.iterdir()] == ["stream"]
