"""Commands on a guest whose RAM is still arriving, and on one that does not start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from corefw_ram.section import RamSectionLoader

from corefw.errors import StateError
from corefw.machine import MachineConfig, RunState
from corefw.testing.tasks import Task, wait_until
from tests.helpers.engines import PATIENCE, Pair, arrived, ended
from tests.helpers.moving import LEISURELY, LISTEN, Move

PLAIN = Path(__file__).parents[2] / "plugins" / "machine_python" / "tests" / "programs" / "plain.py"


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    yield Move(pair)


def recover(move: Move) -> None:
    move.recover()
    move.hurry()


def test_a_guest_that_waits_for_a_page_cannot_be_stopped_while_none_comes(pair: Pair) -> None:
    move = Move(pair, *LEISURELY)
    move.switch()
    move.pause()
    assert wait_until(move.destination.inbound.guest_waits)
    with pytest.raises(StateError, match="until the postcopy migration is recovered"):
        move.destination.stop()
    assert move.destination.machine.run_state is RunState.RUNNING
    recover(move)
    move.completes()
    move.destination.stop()
    assert str(move.destination.machine.run_state) == "paused"


def fail(*_: object) -> NoReturn:
    raise RuntimeError("a bug in a plugin")


def test_a_bug_on_the_destination_pauses_and_loses_nothing(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    move.switch()
    with monkeypatch.context() as patch:
        patch.setattr(RamSectionLoader, "load", fail)
        move.both_reach("postcopy-paused")
    recover(move)
    move.completes()


def test_a_bug_of_a_transport_leaves_a_paused_source_paused(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    move.switch()
    move.pause()
    with monkeypatch.context() as patch:
        uri = move.destination.recover(LISTEN)
        patch.setattr(type(move.source.plugins.transport(uri)), "connect", fail)
        move.source.migrate(uri, resume=True)
        assert wait_until(lambda: "a bug in a plugin" in (move.source.report().error or ""))
        move.reaches(move.source, "postcopy-paused")
    recover(move)
    move.completes()


def test_a_guest_that_waits_before_it_runs_keeps_no_command_waiting(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, start = move.destination.machine, move.destination.machine.start
    began, proceed = threading.Event(), threading.Event()

    def wait_and_start() -> None:
        began.set()
        assert proceed.wait(PATIENCE)
        start()

    monkeypatch.setattr(machine, "start", wait_and_start)
    move.hand_over()
    assert began.wait(PATIENCE)
    move.pause()
    commands: list[Callable[[], object]] = [move.destination.stop, move.destination.cont, move.destination.verify]
    for command in commands:
        with pytest.raises(StateError, match="until the postcopy migration is recovered"):
            Task("a command", command).result(PATIENCE)
    proceed.set()
    recover(move)
    move.completes()


def test_a_guest_that_does_not_start_in_time_goes_on_at_the_source(pair: Pair) -> None:
    """Its after_start() takes longer than stop_timeout, although every page has arrived."""
    source, destination = (
        pair.engine(pair.plugins.machine("python", MachineConfig(f"{PLAIN}:Dawdles", {}, incoming)), {})
        for incoming in (False, True)
    )
    source.cont()
    assert wait_until(lambda: source.machine.run_state is RunState.RUNNING)
    source.set_capabilities({"postcopy-ram": True})
    source.set_parameters({"x-migfw-postcopy-start": "now"})
    assert wait_until(lambda: int(str(source.verify()["steps"])) > 0)
    source.migrate(destination.migrate_incoming(LISTEN))
    assert ended(source) == "failed" and arrived(destination) == "failed"
    assert "did not start within" in (source.report().error or "")
    assert source.machine.run_state is RunState.RUNNING
    source.verify()
    assert destination.machine.run_state is RunState.INMIGRATE


def test_a_guest_for_which_no_thread_is_left_goes_on_at_the_source(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_threads(monkeypatch, "page faults")
    move.limit()
    move.source.migrate(move.destination.migrate_incoming(LISTEN))
    move.source.start_postcopy()
    assert ended(move.source) == "failed" and arrived(move.destination) == "failed"
    assert "no thread" in (move.source.report().error or "")
    assert move.source.machine.run_state is RunState.RUNNING
    move.source.verify()


def test_a_source_may_come_back_once_there_are_threads_again(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination runs the guest, and has no thread to listen with."""
    with monkeypatch.context() as patch:
        refuse_threads(patch, "readmission")
        move.switch()
        move.pause()
    recover(move)
    move.completes()


def refuse_threads(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let no thread with this name start."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("no thread")
        start(thread)

    patch.setattr(threading.Thread, "start", refuse)
