"""A postcopy whose connection breaks again and again continues by itself."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.dispatch import Event
from corefw.engine import Engine
from corefw.errors import SettingsError, StateError
from corefw.states import MigrationStatus, StatusChanged
from corefw.testing.tasks import wait_until
from tests.helpers.cutting import BREAKS, Cut, CutProxy, Watch, listens
from tests.helpers.engines import Pair, query_migrate
from tests.helpers.moving import LISTEN, Move
from tests.helpers.sshd import missing_programs, running_sshd
from tests.matrix.points import RESUME_ACK


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    yield Move(pair)


def begin(move: Move, uri: str, attempts: int) -> None:
    move.source.set_parameters({"x-migfw-reconnect": attempts})
    move.limit()
    move.source.migrate(uri)
    move.source.start_postcopy()
    move.both_reach("postcopy-active")


def test_each_kind_of_break(move: Move) -> None:
    """Neither side gets a command."""
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        begin(move, proxy.uri, 3)  # for each break: pages arrive in between
        for how in BREAKS:
            move.both_reach("postcopy-active")
            assert wait_until(proxy.has_passed(1 << 20))
            proxy.cut(how)
        move.hurry()
        move.completes()


def test_attempts_are_counted_anew_only_when_pages_arrive(move: Move) -> None:
    """Each new connection breaks right after RESUME_ACK, before the source can send anything over it."""
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        begin(move, proxy.uri, 2)
        breaking = True

        def lose_the_rest() -> None:
            if breaking:
                proxy.cut(Cut.LOSE_FORWARD)

        def break_again(event: Event) -> None:
            if breaking and isinstance(event, StatusChanged) and event.old is MigrationStatus.POSTCOPY_RECOVER:
                proxy.stop_at(Watch(False, RESUME_ACK, 0, lose_the_rest))
                proxy.cut(Cut.RESET)

        proxy.stop_at(Watch(False, RESUME_ACK, 0, lose_the_rest))
        move.source.observe(break_again)
        proxy.cut(Cut.RESET)
        assert wait_until(lambda: has_given_up(move.source))
        assert proxy.connections <= 4, "the second may have found pages that had arrived, two more have not"
        breaking = False
        move.source.migrate(proxy.uri, resume=True)
        move.hurry()
        move.completes()


def has_given_up(source: Engine) -> bool:
    answer = query_migrate(source)
    return answer["status"] == "postcopy-paused" and "reconnect" not in answer["x-migfw"]


def test_a_source_without_descriptors_stays_paused(move: Move) -> None:
    where = move.destination.migrate_incoming(LISTEN)
    begin(move, where, 0)
    move.pause()
    with no_more_descriptors():
        move.source.migrate(where, resume=True)
        assert wait_until(lambda: "too many open files" in (move.source.report().error or "").lower()), (
            move.source.report()
        )
    move.reaches(move.source, "postcopy-paused")
    move.destination.recover(where)
    move.source.migrate(where, resume=True)
    move.hurry()
    move.completes()


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process cannot open a file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("scheme", ["unix", "zmq"])
def test_other_transports(move: Move, folder: Path, scheme: str) -> None:
    """The destination is paused, and listens nowhere until `migrate-recover`."""
    where = move.destination.migrate_incoming(f"unix:{folder / 'a'}" if scheme == "unix" else "zmq:tcp://127.0.0.1:0")
    begin(move, where, -1)
    move.destination.pause_migration()
    move.reaches(move.destination, "postcopy-paused")
    assert wait_until(lambda: query_migrate(move.source).get("x-migfw", {}).get("reconnect", {}).get("attempts", 0) > 0)
    move.destination.recover(where)
    move.hurry()
    move.completes()


def test_a_break_on_purpose_lasts(move: Move) -> None:
    where = move.destination.migrate_incoming(LISTEN)
    begin(move, where, -1)
    move.pause()
    time.sleep(0.5)  # more than until the first attempt
    assert move.source.outgoing.status == "postcopy-paused"
    assert "reconnect" not in query_migrate(move.source)["x-migfw"]
    move.source.migrate(where, resume=True)
    move.hurry()
    move.completes()


def test_the_attempts_end_and_more_can_be_allowed(move: Move) -> None:
    where = move.destination.migrate_incoming(LISTEN)
    begin(move, where, 1)
    move.destination.pause_migration()
    move.reaches(move.destination, "postcopy-paused")
    assert wait_until(lambda: "connection refused" in (move.source.report().error or ""))
    move.reaches(move.source, "postcopy-paused")
    assert "reconnect" not in query_migrate(move.source)["x-migfw"], "there was one attempt"
    assert not listens(where)
    assert move.destination.recover(where) == where
    move.source.set_parameters({"x-migfw-reconnect": 2})
    move.hurry()
    move.completes()


def test_a_user_may_name_another_address_meanwhile(move: Move) -> None:
    begin(move, move.destination.migrate_incoming(LISTEN), -1)
    move.destination.pause_migration()
    move.both_reach("postcopy-paused")
    elsewhere = move.destination.recover(LISTEN)
    assert wait_until(lambda: _resumes(move, elsewhere))
    move.hurry()
    move.completes()


def _resumes(move: Move, uri: str) -> bool:
    try:
        move.source.migrate(uri, resume=True)
    except StateError:  # it is dialling at the moment
        return False
    return True


def test_what_is_no_number_of_attempts(move: Move) -> None:
    with pytest.raises(SettingsError, match="x-migfw-reconnect"):
        move.source.set_parameters({"x-migfw-reconnect": -2})


@pytest.mark.sshd
@pytest.mark.skipif(bool(missing_programs()), reason=f"needs OpenSSH: {', '.join(missing_programs())}")
def test_over_ssh(move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection after the tunnel breaks; a new login leads to the same address."""
    with running_sshd(tmp_path / "sshd") as sshd, CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        monkeypatch.setenv("HOME", str(sshd.make_home(tmp_path / "home")))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        begin(move, f"ssh://{sshd.address}/{proxy.uri.replace('127.0.0.1', 'localhost')}", 5)
        assert wait_until(proxy.has_passed(1 << 20))
        proxy.cut(Cut.RESET)
        move.hurry()
        move.completes()
