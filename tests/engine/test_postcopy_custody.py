"""Postcopy fails at each point of the switchover: the guest is never lost, and never runs twice."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from corefw.dispatch import Event
from corefw.engine import Engine
from corefw.errors import MachineError, StateError, UsageError
from corefw.machine import FaultSource, PostcopyMachine, RunState
from corefw.states import MigrationStatus, Side, StatusChanged
from corefw.testing.tasks import wait_until
from corefw.wire.constants import PACKAGE_PING, Command, ReturnMessage, SectionType
from corefw.wire.returnpath import encode_return_message, recv_bitmap_body
from tests.engine.test_postcopy_hostile import NOTHING_ARRIVED
from tests.helpers.engines import Pair, Peer, arrived, ended
from tests.helpers.moving import LISTEN, Move

RECV_BITMAP = bytes((SectionType.COMMAND, 0, Command.RECV_BITMAP))
NOWHERE = "tcp:127.0.0.1:1"


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    yield Move(pair)


def lose_the_package(move: Move) -> None:
    """Break the connection while RUN is on its way, to a destination that never loads it."""
    with Peer() as peer:
        move.hand_over_to(peer)
    move.reaches(move.source, "postcopy-paused")


def pause(move: Move) -> None:
    """Wait until the guest runs on the destination, and break the connection."""
    move.switch()
    move.pause()


def fails_to_resume(move: Move, port: int) -> None:
    """Resume at an address where nothing listens."""
    move.source.migrate(f"tcp:127.0.0.1:{port}", resume=True)
    assert wait_until(lambda: f":{port}:" in (move.source.report().error or "")), move.source.report()
    move.reaches(move.source, "postcopy-paused")


def stays_here(move: Move) -> None:
    assert ended(move.source) in ("failed", "cancelled")
    assert move.source.machine.run_state is RunState.RUNNING
    assert move.destination.machine.run_state is RunState.INMIGRATE
    move.source.verify()


# -- the destination before RUN ----------------------------------------------------------------------------------------


def watch_faults(move: Move, monkeypatch: pytest.MonkeyPatch, first: object) -> None:
    """Call `first` when LISTEN is loaded, right before the device state."""
    machine = move.destination.machine
    assert isinstance(machine, PostcopyMachine) and callable(first)
    watch = machine.watch_faults

    def watch_later() -> FaultSource:
        first()
        return watch()

    monkeypatch.setattr(machine, "watch_faults", watch_later)


def test_a_destination_that_fails_in_listen_leaves_the_guest_to_the_source(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MachineError("no page faults today")

    watch_faults(move, monkeypatch, fail)
    move.begin()
    move.source.start_postcopy()
    assert arrived(move.destination) == "failed"
    stays_here(move)
    assert "no page faults today" in (move.source.report().error or "")


def test_a_cancel_on_the_destination_before_run_leaves_the_guest_to_the_source(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_faults(move, monkeypatch, move.destination.cancel)
    move.begin()
    move.source.start_postcopy()
    assert wait_until(lambda: move.destination.incoming.status == "cancelled")
    stays_here(move)
    assert "cancelled on the destination" in (move.source.report().error or "")


# -- a cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", list(Side))
def test_a_cancel_from_the_moment_of_postcopy_active_on_is_refused(move: Move, side: Side) -> None:
    engine = move.source if side is Side.SOURCE else move.destination
    refused: list[str] = []

    def cancel(event: Event) -> None:
        if isinstance(event, StatusChanged) and event.new is MigrationStatus.POSTCOPY_ACTIVE:
            try:
                engine.cancel()
            except StateError as error:
                refused.append(str(error))

    engine.observe(cancel)
    move.switch()
    move.hurry()
    move.completes()
    assert refused and "cannot cancel" in refused[0]


@pytest.mark.parametrize("seed", range(2))
def test_cancels_that_race_with_the_switch(move: Move, seed: int) -> None:
    """Whichever comes first, one side has the complete guest."""
    choice, over = random.Random(seed), threading.Event()

    def cancel(engine: Engine) -> None:
        while not over.is_set():
            with suppress(UsageError):
                engine.cancel()

    move.begin()
    move.source.start_postcopy()
    engine = choice.choice((move.source, move.destination))
    threads = [threading.Thread(target=cancel, args=(engine,)) for _ in range(3)]
    assert wait_until(lambda: move.source.machine.run_state is not RunState.RUNNING)
    time.sleep(choice.random() * 0.03)
    for thread in threads:
        thread.start()
    move.hurry()
    try:
        if ended(move.source) == "completed":
            move.completes()
        else:
            stays_here(move)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_package_that_was_lost_can_be_given_up_after_a_resume_that_failed(move: Move) -> None:
    """Nothing from the destination shows that it runs the guest, however often it was dialled."""
    lose_the_package(move)
    for port in (1, 2):
        fails_to_resume(move, port)
    with pytest.raises(StateError, match="the guest has left"):
        move.source.cont()
    move.source.cancel()
    assert ended(move.source) == "cancelled"
    assert move.source.machine.run_state is RunState.POSTMIGRATE
    move.source.cont()
    move.source.verify()


@pytest.mark.parametrize("says", ["PONG", "bitmap"])
def test_a_destination_that_has_shown_that_it_runs_the_guest_keeps_it(move: Move, says: str) -> None:
    if says == "PONG":
        with Peer() as peer:
            move.hand_over_to(peer)
            peer.say(ReturnMessage.PONG, PACKAGE_PING)
    else:
        lose_the_package(move)
        with Peer() as peer:
            move.source.migrate(peer.uri, resume=True)
            peer.accept(answer=False)
            peer.read_all(lambda data: RECV_BITMAP in data)
            peer.send(encode_return_message(ReturnMessage.RECV_BITMAP, recv_bitmap_body("ram")) + NOTHING_ARRIVED)
            peer.read_all(lambda data: bytes((SectionType.COMMAND, 0, Command.POSTCOPY_RESUME)) in data)
    move.reaches(move.source, "postcopy-paused")
    fails_to_resume(move, 1)
    with pytest.raises(StateError, match="cannot cancel"):
        move.source.cancel()


# -- a guest that is still arriving ------------------------------------------------------------------------------------


def test_a_guest_that_is_still_arriving_does_not_leave(move: Move) -> None:
    """Missing pages would be sent as zeros."""
    move.destination.settings.set_capabilities({"postcopy-ram": False})
    pause(move)
    for call in (lambda: move.destination.migrate(NOWHERE), move.destination.check):
        with pytest.raises(StateError, match="still arriving"):
            call()
    move.recover()
    move.hurry()
    move.completes()
    move.destination.check()


def test_a_paused_source_resumes_once(move: Move) -> None:
    """A second transport would stay, and resume the migration unasked when it pauses again."""
    pause(move)
    resumed = []

    def resume(uri: str) -> None:
        with suppress(StateError):
            move.source.migrate(uri, resume=True)
            resumed.append(uri)

    address = move.destination.recover(LISTEN)
    threads = [threading.Thread(target=resume, args=(address,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(resumed) == 1
    move.hurry()
    move.completes()


def test_a_paused_source_begins_no_second_migration(move: Move) -> None:
    pause(move)
    with pytest.raises(StateError, match="migration process in progress"):
        move.source.migrate(NOWHERE)
    with pytest.raises(StateError, match="the guest has left"):
        move.source.cont()


def test_a_source_that_is_closed_while_paused_starts_nothing(move: Move) -> None:
    pause(move)
    started: list[RunState] = []
    move.source.machine.watch(lambda old, new: started.append(new))
    move.source.close()
    assert RunState.RUNNING not in started
    assert move.destination.machine.run_state is RunState.RUNNING
    assert move.destination.incoming.status == "postcopy-paused"


@pytest.mark.parametrize("listens", [False, True])
def test_a_destination_that_is_closed_while_paused_leaves_the_source_as_it_is(move: Move, listens: bool) -> None:
    pause(move)
    if listens:
        move.destination.recover(LISTEN)
    move.destination.close()
    assert move.source.outgoing.status == "postcopy-paused"
    assert move.source.machine.run_state is RunState.FINISH_MIGRATE
