"""Requested pages over a channel of their own (postcopy-preempt), with real guest processes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.errors import SettingsError
from corefw.testing.tasks import wait_until
from tests.helpers.cutting import Cut, CutProxy
from tests.helpers.engines import Pair, query_migrate
from tests.helpers.moving import LISTEN, Move


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    made = Move(pair)
    for engine in (made.source, made.destination):
        engine.set_capabilities({"postcopy-preempt": True})
    yield made


def requests(move: Move) -> int:
    return int(query_migrate(move.source).get("ram", {}).get("postcopy-requests", 0))


@pytest.mark.parametrize("scheme", ["tcp", "unix", "zmq"])
def test_the_guest_runs_before_its_pages_are_there(move: Move, folder: Path, scheme: str) -> None:
    address = {"tcp": LISTEN, "unix": f"unix:{folder / 'a'}", "zmq": "zmq:tcp://127.0.0.1:0"}[scheme]
    move.limit()
    move.source.migrate(move.destination.migrate_incoming(address))
    move.source.start_postcopy()
    assert wait_until(lambda: requests(move) > 0), "no page was asked for"
    move.hurry()
    move.completes()


def switch(move: Move) -> None:
    """Begin, and have the guest wait for pages on the destination."""
    before = requests(move)
    move.switch()
    assert wait_until(lambda: requests(move) > before), "no page was asked for"


def pauses(move: Move) -> None:
    move.reaches(move.source, "postcopy-paused")
    move.reaches(move.destination, "postcopy-paused")


def recover(move: Move) -> None:
    move.source.migrate(move.destination.recover(LISTEN), resume=True)
    move.reaches(move.source, "postcopy-active")
    move.reaches(move.destination, "postcopy-active")


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_connection_that_is_broken_on_purpose(move: Move, side: str) -> None:
    """Twice: the channel of requested pages is replaced as well."""
    switch(move)
    for _ in range(2):
        (move.source if side == "source" else move.destination).pause_migration()
        pauses(move)
        before = requests(move)
        recover(move)
        assert wait_until(lambda: requests(move) > before), "no page was asked for"
    move.hurry()
    move.completes()


@pytest.mark.parametrize("how", [Cut.RESET, Cut.END, Cut.FORWARD])
def test_a_channel_of_requested_pages_that_is_cut(move: Move, how: Cut) -> None:
    """The stream's own channel works, and still both sides pause: a page may have been lost."""
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        assert wait_until(lambda: requests(move) > 0), "no page was asked for"
        proxy.cut(how)
        pauses(move)
        recover(move)
        move.hurry()
        move.completes()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_it_needs_postcopy(pair: Pair) -> None:
    with pytest.raises(SettingsError, match="requires postcopy-ram"):
        pair.source().set_capabilities({"postcopy-preempt": True})


def test_a_transport_with_one_channel_is_refused(move: Move) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(SettingsError, match="'fd:' has only one channel .*'postcopy-preempt'"):
            move.source.migrate(f"fd:{ours.fileno()}")
        with pytest.raises(SettingsError, match="'fd:' has only one channel"):
            move.destination.migrate_incoming(f"fd:{theirs.fileno()}")


def test_a_destination_without_it_is_found_out_before_the_guest_leaves(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strays, "FIRST_WORDS", 0.01)
    move.destination.set_capabilities({"postcopy-preempt": False})
    move.begin()
    assert wait_until(lambda: query_migrate(move.source).get("ram", {}).get("transferred", 0) > 4 << 20)
    move.source.start_postcopy()
    assert ended(move.source) == "failed"
    assert "switch capability 'postcopy-preempt' on there too" in (move.source.report().error or "")
    runs_on(move.source)


# -- what may come over the channel ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(header(0, RamFlag.PAGE | RamFlag.CONTINUE), id="no-block"),
        pytest.param(header(0, RamFlag.PAGE) + name("rom"), id="other-block"),
        pytest.param(header(1 << 40, RamFlag.ZERO) + name("ram") + b"\0", id="outside"),
        pytest.param(header(1 << 20, RamFlag.MEM_SIZE), id="no-page"),
        pytest.param(b"\xff" * 8, id="garbage"),
        pytest.param(EOS, id="end"),
    ],
)
def test_what_is_no_requested_page_pauses_both_sides(move: Move, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The guest goes on, and nothing of it is in its memory."""
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        assert wait_until(lambda: proxy.connections == 2)
        proxy.inject(data)
        move.source.start_postcopy()
        pauses(move)
        assert "requested pages: expected" in caplog.text
        recover(move)
        move.hurry()
        move.completes()
