"""Postcopy of a python guest over tcp, with real processes: it runs on the destination before its RAM arrives."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.errors import MachineError, SettingsError, StateError
from corefw.inspection import inspect
from corefw.inspection.model import Inspection
from corefw.machine import RunState
from corefw.memory import userfault
from corefw.testing.tasks import wait_until
from corefw.wire.constants import ALIVE_PING, MIGFW_PING, PACKAGE_PING, READY_PING, Command, ReturnMessage, SectionType
from corefw.wire.records import parse_ping
from corefw.wire.stream import MemorySource
from tests.golden.record import load
from tests.helpers.cutting import BREAKS, Cut, CutProxy, host_and_port, listens
from tests.helpers.engines import PATIENCE, Pair, Peer, arrived, ended, query_migrate, runs_on
from tests.helpers.moving import LISTEN, Move


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    yield Move(pair)


def test_the_guest_runs_before_its_pages_are_there(move: Move) -> None:
    move.switch()
    assert wait_until(lambda: query_migrate(move.source)["ram"]["postcopy-requests"] > 0), "no page was asked for"
    assert move.source.machine.run_state is RunState.FINISH_MIGRATE
    move.hurry()
    move.completes()
    ram = query_migrate(move.source)["ram"]
    assert ram["postcopy-bytes"] > 0
    assert "postcopy-blocktime" not in query_migrate(move.destination), "without the capability nothing is measured"
    assert ram["transferred"] == ram["precopy-bytes"] + ram["downtime-bytes"] + ram["postcopy-bytes"]


def test_the_commands_are_those_of_qemu(move: Move) -> None:
    """Compared with a recording of a real QEMU."""
    with CutProxy(move.destination.migrate_incoming(LISTEN), record=True) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        move.reaches(move.source, "postcopy-active")
        move.hurry()
        move.completes()
    ours, theirs = inspect(MemorySource(bytes(proxy.recorded))), inspect(MemorySource(load("pc-postcopy")))
    assert commands(ours) == commands(theirs)
    assert ours.complete
    assert ours.description is None


OWN_PINGS = [f"PING {number}" for number in (READY_PING, MIGFW_PING, ALIVE_PING)]


def commands(inspection: Inspection) -> list[str]:
    """The commands in order, including those in the package, and PINGs with their numbers. Consecutive discards count
    as one, and migfw's own PINGs are left out."""
    names: list[str] = []
    for entry in inspection.commands:
        record, name = entry.record, entry.record.name
        if record.command is Command.PING:
            name = f"PING {parse_ping(record.payload)}"
        if name not in names[-1:] and name not in OWN_PINGS:
            names.append(name)
        names += commands(entry.package) if entry.package is not None else []
    return names


@pytest.mark.parametrize("scheme", ["unix", "zmq"])
def test_other_transports(pair: Pair, folder: Path, scheme: str) -> None:
    """A migration may continue over another transport than it began with."""
    move = Move(pair)
    move.limit()
    first = move.destination.migrate_incoming(f"unix:{folder / 'a'}" if scheme == "unix" else "zmq:tcp://127.0.0.1:0")
    move.source.migrate(first)
    move.source.start_postcopy()
    move.both_reach("postcopy-active")
    move.destination.pause_migration()
    move.both_reach("postcopy-paused")
    move.recover()
    move.hurry()
    move.completes()


def test_a_switch_at_once(move: Move) -> None:
    move.source.set_parameters({"x-migfw-postcopy-start": "now"})
    move.begin(precopy=0)
    move.reaches(move.source, "postcopy-active")
    assert query_migrate(move.source)["ram"]["precopy-bytes"] < 1 << 20
    move.hurry()
    move.completes()
    switch = query_migrate(move.source)["x-migfw"]["postcopy-switch"]
    assert switch["reason"] == "it was to switch at once"
    assert switch["remaining"] == 32 << 20


# -- a connection that breaks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_connection_that_is_broken_on_purpose(move: Move, side: str) -> None:
    move.switch()
    (move.source if side == "source" else move.destination).pause_migration()
    move.both_reach("postcopy-paused")
    assert move.source.machine.run_state is RunState.FINISH_MIGRATE
    assert move.destination.machine.run_state is RunState.RUNNING
    if side == "source":
        assert move.source.report().error == "its connection was closed by migrate-pause"
    move.recover()
    move.hurry()
    move.completes()


@pytest.mark.parametrize("direction", BREAKS)
def test_a_connection_that_is_cut(move: Move, direction: Cut) -> None:
    """Twice; the guest writes all the time, and loses nothing."""
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        for _ in range(2):
            move.both_reach("postcopy-active")
            assert wait_until(proxy.has_passed(1 << 20))
            proxy.cut(direction)
            move.both_reach("postcopy-paused")
            proxy.lead_to(move.destination.recover(LISTEN))
            move.source.migrate(proxy.uri, resume=True)
        move.hurry()
        move.completes()


def pause(move: Move) -> None:
    """Switch to postcopy, and break the connection."""
    move.switch()
    move.pause()


def test_a_resume_that_fails_can_be_tried_again(move: Move) -> None:
    pause(move)
    move.source.migrate("tcp:127.0.0.1:1", resume=True)
    assert wait_until(lambda: "127.0.0.1:1:" in (move.source.report().error or "")), move.source.report()
    move.reaches(move.source, "postcopy-paused")
    address = move.destination.recover(LISTEN)
    move.recover()
    assert not listens(address), "migrate-recover replaces the address that another one gave"
    move.hurry()
    move.completes()


def test_a_resume_needs_no_migrate_recover(move: Move) -> None:
    """The destination still listens at the old address, and `migrate-recover` with that address is allowed."""
    address = move.destination.migrate_incoming(LISTEN)
    move.limit()
    for _ in range(2):
        if move.source.outgoing.status == "postcopy-paused":
            move.source.migrate(address, resume=True)
        else:
            move.source.migrate(address)
            move.source.start_postcopy()
        move.both_reach("postcopy-active")
        move.pause()
    assert move.destination.recover(address) == address
    move.source.migrate(address, resume=True)
    move.hurry()
    move.completes()


def test_a_destination_that_paused_on_purpose_waits_for_migrate_recover(move: Move) -> None:
    address = move.destination.migrate_incoming(LISTEN)
    move.limit()
    move.source.migrate(address)
    move.source.start_postcopy()
    move.both_reach("postcopy-active")
    move.destination.pause_migration()
    move.both_reach("postcopy-paused")
    assert not listens(address)
    move.recover()
    move.hurry()
    move.completes()


def test_a_source_may_be_back_before_the_break_was_noticed(move: Move) -> None:
    """The destination learns of the break from its returning source."""
    address = move.destination.migrate_incoming(LISTEN)
    with CutProxy(address) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        move.both_reach("postcopy-active")
        proxy.cut(Cut.HALF_BACKWARD)
        move.reaches(move.source, "postcopy-paused")
        assert "closed the connection" in (move.source.report().error or "")
        move.source.migrate(address, resume=True)
        move.hurry()
        move.completes()


# -- strangers ---------------------------------------------------------------------------------------------------------


def test_strangers_at_the_recovery_keep_nobody_out(move: Move) -> None:
    """One is silent, one sends garbage, and one pretends to be a QEMU that resumes."""
    pause(move)
    where = move.destination.recover(LISTEN)
    with contextlib.ExitStack() as stack:
        silent, *others = [stack.enter_context(socket.create_connection(host_and_port(where))) for _ in range(3)]
        others[0].sendall(b"GET / HTTP/1.0\r\n\r\n")
        others[1].sendall(bytes((SectionType.COMMAND, 0, Command.POSTCOPY_RESUME, 0, 0)))
        for one in others:
            one.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionError):
                assert not one.recv(1), "it was answered"
        assert move.destination.incoming.status == "postcopy-paused"
        move.source.migrate(where, resume=True)
        move.hurry()
        move.completes()
        silent.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError):
            assert not silent.recv(1)


def test_a_stranger_who_stays_silent_is_hung_up_on(move: Move) -> None:
    pause(move)
    move.destination.set_parameters({"x-migfw-incoming-timeout": 100})
    where = move.destination.recover(LISTEN)
    with socket.create_connection(host_and_port(where)) as stranger:
        stranger.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError):
            assert not stranger.recv(1)
    assert move.destination.incoming.status == "postcopy-paused" and listens(where)


def test_a_silent_stranger_at_the_address_can_be_hung_up_on(move: Move) -> None:
    pause(move)
    with Peer() as peer:
        move.source.migrate(peer.uri, resume=True)
        move.reaches(move.source, "postcopy-recover-setup")
        peer.accept(answer=False)
        move.source.pause_migration()
        move.reaches(move.source, "postcopy-paused")
    assert move.source.report().error == "its connection was closed by migrate-pause"


def test_two_migrations_are_not_mixed(pair: Pair) -> None:
    """Their RAM blocks have the same names, and both are paused."""
    first, second = Move(pair), Move(pair)
    for move in (first, second):
        pause(move)
    theirs = second.destination.recover(LISTEN)
    first.source.migrate(theirs, resume=True)
    assert wait_until(lambda: "destination of this migration" in (first.source.report().error or ""))
    first.reaches(first.source, "postcopy-paused")
    assert second.destination.incoming.status == "postcopy-paused"
    second.source.migrate(theirs, resume=True)
    first.recover()
    for move in (first, second):
        move.hurry()
        move.completes()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_commands_that_come_at_the_wrong_time(move: Move) -> None:
    for call, words in [
        (move.source.start_postcopy, "must be started after migration has been started"),
        (move.source.pause_migration, "only supported during postcopy-active"),
        (lambda: move.destination.recover(LISTEN), "only be run when postcopy is paused"),
        (lambda: move.source.migrate("tcp:127.0.0.1:1", resume=True), "no paused migration"),
    ]:
        with pytest.raises(StateError, match=words):
            call()
    move.source.settings.set_capabilities({"postcopy-ram": False})
    with pytest.raises(StateError, match="Enable postcopy"):
        move.source.start_postcopy()


def test_a_cancel_in_postcopy_is_refused(move: Move) -> None:
    move.switch()
    for engine in (move.source, move.destination):
        with pytest.raises(StateError, match="cannot cancel"):
            engine.cancel()
    with pytest.raises(StateError, match="runs on the destination"):
        move.source.cont()
    move.hurry()
    move.completes()


def test_a_destination_that_cannot_serve_page_faults_refuses_before_any_ram_is_sent(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = userfault.register

    def deny(fd: int, address: int, length: int, mode: userfault.Mode) -> None:
        if mode & userfault.Mode.MISSING:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        register(fd, address, length, mode)

    monkeypatch.setattr(userfault, "register", deny)
    move.begin()
    assert ended(move.source) == "failed" and arrived(move.destination) == "failed"
    error = move.source.report().error or ""
    assert "page faults" in error and "vm.unprivileged_userfaultfd" in error
    assert move.source.machine.run_state is RunState.RUNNING
    assert query_migrate(move.source).get("ram", {}).get("normal", 0) == 0


def test_a_machine_without_page_faults_refuses(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.settings.set_capabilities({"postcopy-ram": True})
    source.migrate(destination.migrate_incoming(LISTEN))
    assert ended(source) == "failed"
    assert "while its RAM is still arriving" in (source.report().error or "")
    runs_on(source)


def test_a_switch_needs_the_capability(move: Move) -> None:
    move.source.set_capabilities({"postcopy-ram": False})
    move.source.set_parameters({"x-migfw-postcopy-start": "when-stuck"})
    with pytest.raises(SettingsError, match="needs capability 'postcopy-ram'"):
        move.source.migrate("tcp:127.0.0.1:1")


def test_a_transport_without_a_return_path_is_refused(move: Move, folder: Path) -> None:
    move.source.settings.set_capabilities({"return-path": False})
    with pytest.raises(SettingsError, match="which postcopy needs"):
        move.source.migrate(f"file:{folder / 'guest'}")


def test_precopy_completes_if_nobody_asks_for_postcopy(move: Move) -> None:
    move.begin(precopy=0)
    move.completes()
    assert query_migrate(move.source)["ram"]["postcopy-bytes"] == 0


# -- which side may run the guest --------------------------------------------------------------------------------------


def test_a_destination_that_refuses_the_package_leaves_the_guest_to_the_source(move: Move) -> None:
    with Peer() as peer:
        move.hand_over_to(peer)
        peer.say(ReturnMessage.SHUT, 1)
        assert ended(move.source) == "failed"
    assert move.source.machine.run_state is RunState.RUNNING
    move.source.verify()


def test_a_destination_that_fails_once_it_may_have_started_the_guest_keeps_it(move: Move) -> None:
    """Unlike QEMU, whose SHUT 1 does not show whether the guest ran."""
    with Peer() as peer:
        move.hand_over_to(peer)
        peer.say(ReturnMessage.PONG, PACKAGE_PING)
        peer.say(ReturnMessage.SHUT, 1)
        assert ended(move.source) == "failed"
    assert move.source.machine.run_state is RunState.POSTMIGRATE
    assert "may be running the guest" in (move.source.report().error or "")
    move.source.cont()
    move.source.verify()


def test_a_package_that_was_lost_is_given_up_by_a_cancel(move: Move) -> None:
    with Peer() as peer:
        move.hand_over_to(peer)
    move.reaches(move.source, "postcopy-paused")
    assert str(move.source.machine.run_state) == "finish-migrate"
    move.source.cancel()
    assert ended(move.source) == "cancelled"
    assert move.source.machine.run_state is RunState.POSTMIGRATE
    move.source.cont()
    move.source.verify()


def test_a_guest_that_does_not_start_goes_on_at_the_source(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MachineError("no room for this guest")

    monkeypatch.setattr(move.destination.machine, "start", fail)
    move.begin()
    move.source.start_postcopy()
    assert ended(move.source) == "failed" and arrived(move.destination) == "failed"
    assert "no room for this guest" in (move.source.report().error or "")
    assert move.source.machine.run_state is RunState.RUNNING
    move.source.verify()
