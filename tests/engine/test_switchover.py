"""SWITCHOVER_ACK and SWITCHOVER_START between two engines, and with peers that misbehave."""

from __future__ import annotations

import select

import pytest

from corefw.errors import SettingsError
from corefw.wire.constants import ReturnMessage
from corefw.wire.returnpath import encode_return_message
from tests.helpers.engines import Pair, Peer, arrived, counting, ended, query_migrate, runs_on


def test_a_running_guest_moves_with_switchover_ack(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    for engine in (source, destination):
        engine.set_capabilities({"switchover-ack": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and arrived(destination) == "completed"
    moved = counting(source).check()
    runs_on(destination)
    assert counting(destination).check() > moved


def test_the_source_does_not_switch_over_before_the_ack(pair: Pair) -> None:
    source = pair.source()
    source.set_capabilities({"switchover-ack": True, "pause-before-switchover": True})
    with Peer() as peer:
        source.migrate(peer.uri)
        connection = peer.accept()
        peer.read_while(lambda: query_migrate(source)["status"] == "setup")
        peer.read_while(lambda: select.select([connection], [], [], 0.5)[0] != [])  # all is sent, the source waits
        assert query_migrate(source)["status"] == "active"
        connection.sendall(encode_return_message(ReturnMessage.SWITCHOVER_ACK))
        peer.read_while(lambda: query_migrate(source)["status"] == "active")
        assert query_migrate(source)["status"] == "pre-switchover"
        source.cancel()
    assert ended(source) == "cancelled"
    runs_on(source)


def test_a_destination_without_the_capability_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corefw.engine.precopy.ACK_PATIENCE", 0.2)
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"switchover-ack": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "failed" and arrived(destination) == "failed"
    assert "'switchover-ack'" in query_migrate(source)["error-desc"]
    runs_on(source)


def test_the_capability_needs_a_return_path(pair: Pair) -> None:
    source = pair.source()
    with pytest.raises(SettingsError, match="'switchover-ack' requires capability 'return-path'"):
        source.set_capabilities({"switchover-ack": True, "return-path": False})
