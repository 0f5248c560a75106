"""A postcopy that ends while its connection is broken: the source learns the outcome when it returns."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest

from corefw.errors import StateError
from corefw.machine import RunState
from corefw.testing.tasks import wait_until
from corefw.wire.constants import PACKAGE_PING
from tests.helpers.cutting import Cut, CutProxy, Watch, listens
from tests.helpers.engines import PATIENCE, Pair, ended
from tests.helpers.moving import LISTEN, PACKAGED, Move
from tests.matrix.points import SHUT, pong


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    yield Move(pair)


def begin(move: Move, proxy: CutProxy) -> None:
    move.limit()
    move.source.migrate(proxy.uri)
    move.source.start_postcopy()


def assert_taken_back(move: Move) -> None:
    """Check that the source learns why the guest does not start on the destination, and runs it again."""
    assert ended(move.source) == "failed"
    assert "no licence on this host" in (move.source.report().error or "")
    assert move.source.machine.run_state is RunState.RUNNING
    move.source.verify()


def test_a_source_that_missed_the_confirmation_completes(move: Move) -> None:
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        proxy.stop_at(Watch(False, SHUT, 0, lambda: proxy.cut(Cut.RESET)))
        begin(move, proxy)
        move.hurry()
        move.reaches(move.destination, "completed")
        move.reaches(move.source, "postcopy-paused")
    assert wait_until(lambda: _recovers(move))
    move.completes()
    assert move.source.machine.run_state is RunState.POSTMIGRATE


def test_a_source_that_dials_again_by_itself_needs_nobody(move: Move) -> None:
    """The destination has ended, but listens at the old address until its source knows the outcome."""
    move.source.set_parameters({"x-migfw-reconnect": -1})
    where = move.destination.migrate_incoming(LISTEN)
    with CutProxy(where) as proxy:
        proxy.stop_at(Watch(False, SHUT, 0, lambda: proxy.cut(Cut.RESET)))
        begin(move, proxy)
        move.hurry()
        move.completes()
    assert wait_until(lambda: not listens(where)), "it goes on listening"


def _recovers(move: Move) -> bool:
    try:
        move.recover()
    except StateError:  # the destination is still waiting for its source to hang up
        return False
    return True


def test_a_source_that_missed_the_refusal_takes_the_guest_back(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination has sent PONG 3, so the source must not start the guest before it learns that it does not run."""
    seen = Watch(False, pong(PACKAGE_PING), 8, lambda: None)  # it has passed
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        proxy.stop_at(seen)

        def fail() -> None:
            assert seen.done.wait(PATIENCE)
            proxy.cut(Cut.END)
            move.reaches(move.source, "postcopy-paused")
            raise RuntimeError("no licence on this host")

        monkeypatch.setattr(move.destination.machine, "start", fail)
        begin(move, proxy)
        move.reaches(move.destination, "failed")
    with pytest.raises(StateError, match="cannot cancel"):
        move.source.cancel()
    assert wait_until(lambda: _recovers(move))
    assert_taken_back(move)


def test_a_source_that_dials_again_by_itself_takes_the_guest_back(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    move.source.set_parameters({"x-migfw-reconnect": -1})
    seen = Watch(False, pong(PACKAGE_PING), 8, lambda: None)  # it has passed
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        proxy.stop_at(seen)

        def fail() -> None:
            assert seen.done.wait(PATIENCE)
            proxy.cut(Cut.RESET)
            raise RuntimeError("no licence on this host")

        monkeypatch.setattr(move.destination.machine, "start", fail)
        begin(move, proxy)
        assert_taken_back(move)


@pytest.mark.parametrize("by_itself", [False, True], ids=["by hand", "by itself"])
def test_a_source_whose_package_was_lost_takes_the_guest_back(move: Move, by_itself: bool) -> None:
    """The destination has heard of no guest that it may start, so it fails; the source cannot know."""
    move.source.set_parameters({"x-migfw-reconnect": -1 if by_itself else 0})
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        proxy.stop_at(Watch(True, re.compile(re.escape(PACKAGED)), 0, lambda: proxy.cut(Cut.RESET)))
        begin(move, proxy)
        move.reaches(move.destination, "failed")
        if not by_itself:
            move.reaches(move.source, "postcopy-paused")
            assert wait_until(lambda: _recovers(move))
        assert ended(move.source) == "failed"
    assert "the peer reset the connection" in (move.source.report().error or "")
    assert move.source.machine.run_state is RunState.RUNNING
    move.source.verify()


def test_a_guest_that_does_not_start_after_a_recovery_runs_on_the_source(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovered = threading.Event()
    seen = Watch(False, pong(PACKAGE_PING), 8, lambda: None)  # it has passed
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        proxy.stop_at(seen)

        def fail() -> None:
            assert recovered.wait(PATIENCE)
            raise RuntimeError("no licence on this host")

        monkeypatch.setattr(move.destination.machine, "start", fail)
        begin(move, proxy)
        assert seen.done.wait(PATIENCE)
        proxy.cut(Cut.END)
        move.both_reach("postcopy-paused")
    move.recover()
    move.reaches(move.destination, "postcopy-active")
    recovered.set()
    assert_taken_back(move)


def test_a_destination_that_is_told_to_wait_again_forgets_the_outcome(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no licence on this host")

    monkeypatch.setattr(move.destination.machine, "start", fail)
    move.begin()
    move.source.start_postcopy()
    move.reaches(move.destination, "failed")
    assert ended(move.source) == "failed"
    move.destination.migrate_incoming(LISTEN)
    with pytest.raises(StateError, match="when postcopy is paused"):
        move.destination.recover(LISTEN)
