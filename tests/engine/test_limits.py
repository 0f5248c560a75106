"""Limits on how long a migration may take, between real engines and with a peer that hangs."""

from __future__ import annotations

import contextlib
import socket
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from corefw.engine import Engine
from corefw.machine import RunState
from corefw.memory.hashes import HashLog
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until
from tests.helpers.engines import PATIENCE, Pair, Peer, arrived, ended, query_migrate, runs_on
from tests.helpers.machines import CountingMachine

MIB = 1 << 20


def big(*, incoming: bool = False) -> CountingMachine:
    """A guest with 1 MiB of RAM that is not zero."""
    machine = CountingMachine(pages=256, incoming=incoming)
    if not incoming:
        machine.block.pages[:, 8:] = 1
    return machine


def sends(source: Engine) -> None:
    """Wait until the first pass is under way."""
    assert wait_until(lambda: query_migrate(source).get("ram", {}).get("transferred", 0) > 4096)


def test_a_timeout_ends_the_migration_and_the_guest_runs_on(pair: Pair) -> None:
    source, destination = pair.source(big()), pair.destination(big(incoming=True))
    source.set_parameters({"max-bandwidth": 64 << 10})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    sends(source)
    source.set_parameters({"x-migfw-timeout": 300})
    assert ended(source) == "failed"
    reason = query_migrate(source)["error-desc"]
    assert "it took longer than 300 ms (x-migfw-timeout)" in reason
    assert "left in pass 1" in reason
    runs_on(source)
    assert arrived(destination) == "failed"


def test_or_stops_the_guest_and_finishes(pair: Pair) -> None:
    source, destination = pair.source(big()), pair.destination(big(incoming=True))
    source.set_parameters({"max-bandwidth": 256 << 10, "downtime-limit": 1})
    source.set_parameters({"x-migfw-on-timeout": "switchover"})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    sends(source)
    source.set_parameters({"x-migfw-timeout": 300})
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    forced, late = query_migrate(source)["x-migfw"]["warnings"]
    assert "it took longer than 300 ms (x-migfw-timeout), so the guest was stopped with" in forced
    assert "over the downtime-limit of 1 ms" in late
    assert "were sent while it was stopped" in late
    runs_on(destination)


class RestlessLog(HashLog):
    """The dirty log of a guest that writes in each pass, even if its thread does not run for a while."""

    def harvest(self) -> NDArray[np.int64]:
        self._block.pages[0, 100] += 1
        return super().harvest()


def test_so_many_passes_and_no_more(pair: Pair) -> None:
    machine = CountingMachine()
    machine.block.dirty_log = RestlessLog(machine.block)
    source, destination = pair.source(machine), pair.destination()
    source.set_parameters({"downtime-limit": 0, "max-bandwidth": 1 << 20, "x-migfw-max-passes": 2})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "failed"
    assert "2 passes were sent (x-migfw-max-passes)" in query_migrate(source)["error-desc"]
    runs_on(source)


def test_a_timeout_may_be_set_while_it_runs(pair: Pair) -> None:
    source, destination = pair.source(big()), pair.destination(big(incoming=True))
    source.set_parameters({"downtime-limit": 0, "max-bandwidth": 64 << 10})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    sends(source)
    source.set_parameters({"x-migfw-timeout": 1})
    assert ended(source) == "failed"
    runs_on(source)


@pytest.mark.parametrize("action", ["cancel", "switchover"])
def test_a_destination_that_is_never_reached(pair: Pair, action: str) -> None:
    """Its queue of connections is full, so there is nothing to switch over to."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        source = pair.source()
        source.set_parameters({"x-migfw-timeout": 300, "x-migfw-on-timeout": action})
        source.migrate(f"tcp:127.0.0.1:{full.getsockname()[1]}")
        assert ended(source) == "failed"
    assert "x-migfw-timeout" in query_migrate(source)["error-desc"]
    runs_on(source)


def test_a_destination_that_takes_nothing_more(pair: Pair) -> None:
    """The migration thread hangs in a send, where it cannot look at a clock."""
    machine = CountingMachine(pages=32768)
    machine.block.pages[:, 8:] = 1
    with Peer() as peer:
        source = pair.source(machine)
        source.set_capabilities({"return-path": False})
        source.set_parameters({"x-migfw-timeout": 1000})
        source.migrate(peer.uri)
        peer.accept()
        assert ended(source) == "failed"
        assert "it took longer than 1.00 s" in query_migrate(source)["error-desc"]
        runs_on(source)


@pytest.mark.parametrize("stopped", [False, True], ids=["in a pass", "when the guest is stopped"])
def test_a_destination_that_takes_nothing_more_is_not_switched_over_to(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    monkeypatch.setattr("corefw.engine.limits.STALL", 0.5)
    machine = CountingMachine(pages=32768)
    machine.block.pages[:, 8:] = 1
    with Peer() as peer:
        source = pair.source(machine)
        source.set_capabilities({"return-path": False, "pause-before-switchover": stopped})
        source.set_parameters({"x-migfw-on-timeout": "switchover", "max-bandwidth": MIB if stopped else 0})
        source.migrate(peer.uri)
        peer.accept()
        assert source.outgoing.wait(frozenset({MigrationStatus.ACTIVE}), PATIENCE)
        source.set_parameters({"x-migfw-timeout": 1})
        if stopped:
            peer.read_while(lambda: source.outgoing.status is MigrationStatus.ACTIVE)
            source.continue_migration(MigrationStatus.PRE_SWITCHOVER)
        assert ended(source) == "failed"
        reason = query_migrate(source)["error-desc"]
        assert "it took longer than 1 ms (x-migfw-timeout), and the destination has taken nothing for" in reason
        runs_on(source)


def test_a_guest_that_was_stopped_for_the_switchover_is_not_called_back(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert source.outgoing.wait(frozenset({MigrationStatus.PRE_SWITCHOVER}), PATIENCE)
    source.set_parameters({"x-migfw-timeout": 1})
    time.sleep(0.3)
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    source.continue_migration(MigrationStatus.PRE_SWITCHOVER)
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    runs_on(destination)
