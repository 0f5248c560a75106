"""Requested pages over a channel of their own (postcopy-preempt), with real guest processes."""

from __future__ import annotations

import contextlib
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from corefw.engine.examination import MOST
from corefw.errors import SettingsError
from corefw.machine import RunState
from corefw.testing.tasks import settled, wait_until
from corefw.wire.constants import RamFlag
from tests.helpers.cutting import BREAKS, Cut, CutProxy, host_and_port
from tests.helpers.engines import PATIENCE, Pair, ended, query_migrate
from tests.helpers.moving import LEISURELY, LISTEN, Move
from tests.helpers.ram import EOS
from tests.helpers.sshd import missing_programs, running_sshd

RECORD = 8 + 4 + 4096 + 64
"""Bytes of a page's record that names its block, and of the section around it, at most."""


@pytest.fixture
def move(pair: Pair) -> Move:
    return preempting(Move(pair))


def preempting(move: Move) -> Move:
    for engine in (move.source, move.destination):
        engine.set_capabilities({"postcopy-preempt": True})
    return move


def requests(move: Move) -> int:
    return int(query_migrate(move.source).get("ram", {}).get("postcopy-requests", 0))


def asks_again(move: Move, before: int) -> bool:
    return requests(move) > before


@pytest.mark.parametrize("scheme", ["tcp", "unix", "zmq"])
def test_the_guest_runs_before_its_pages_are_there(move: Move, folder: Path, scheme: str) -> None:
    address = {"tcp": LISTEN, "unix": f"unix:{folder / 'a'}", "zmq": "zmq:tcp://127.0.0.1:0"}[scheme]
    move.limit()
    move.source.migrate(move.destination.migrate_incoming(address))
    move.source.start_postcopy()
    assert wait_until(partial(asks_again, move, 0)), "no page was asked for"
    move.hurry()
    move.completes()


@pytest.mark.parametrize("preempt", [False, True])
def test_the_limit_holds_for_what_is_not_requested_and_for_nothing_else(move: Move, preempt: bool) -> None:
    """The guest needs more than the limit allows, and gets it; meanwhile the rest keeps to the limit."""
    for engine in (move.source, move.destination):
        engine.set_capabilities({"postcopy-preempt": preempt})
    limit = 16 << 10
    move.begin()
    move.source.set_parameters({"max-postcopy-bandwidth": limit})
    began = time.monotonic()
    move.source.start_postcopy()
    assert wait_until(partial(asks_again, move, int(2 * PATIENCE * limit) // RECORD)), "requested pages are held back"
    ram = query_migrate(move.source)["ram"]
    background = ram["postcopy-bytes"] - ram["postcopy-requests"] * RECORD
    assert background <= limit * (time.monotonic() - began) + (256 << 10)
    move.hurry()
    move.completes()


def switch(move: Move) -> None:
    """Begin, and let the guest wait for pages on the destination."""
    move.switch()
    assert wait_until(partial(asks_again, move, 0)), "no page was asked for"


def recover(move: Move) -> None:
    """Resume, and send without a limit."""
    move.recover()
    move.hurry()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_connection_that_is_broken_on_purpose(pair: Pair, side: str) -> None:
    """Twice: the channel of requested pages is replaced as well."""
    move = preempting(Move(pair, *LEISURELY))
    switch(move)
    for _ in range(2):
        (move.source if side == "source" else move.destination).pause_migration()
        move.both_reach("postcopy-paused")
        before = requests(move)
        move.recover()
        assert wait_until(partial(asks_again, move, before)), "no page was asked for"
    move.hurry()
    move.completes()


@pytest.mark.sshd
@pytest.mark.skipif(bool(missing_programs()), reason=f"needs OpenSSH: {', '.join(missing_programs())}")
def test_over_ssh(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every channel is a login of its own. When all of them break, both are made anew."""
    move = preempting(Move(pair, *LEISURELY))
    with running_sshd(tmp_path / "sshd") as sshd:
        monkeypatch.setenv("HOME", str(sshd.make_home(tmp_path / "home")))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        move.source.set_parameters({"x-migfw-reconnect": -1})
        move.limit()
        move.source.migrate(f"ssh://{sshd.address}/{move.destination.migrate_incoming(LISTEN)}")
        move.source.start_postcopy()
        assert wait_until(partial(asks_again, move, 0)), "no page was asked for"
        before = requests(move)
        sshd.kill_sessions()
        assert wait_until(partial(asks_again, move, before)), "no page was asked for"
        move.hurry()
        move.completes()


@pytest.mark.parametrize("how", BREAKS)
def test_a_channel_of_requested_pages_that_is_cut(move: Move, how: Cut) -> None:
    """Both sides pause although the stream's own channel works, because a page may have been lost."""
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        assert wait_until(partial(asks_again, move, 0)), "no page was asked for"
        assert wait_until(lambda: proxy.connections == 2)
        proxy.cut(how)
        move.both_reach("postcopy-paused")
        recover(move)
        move.completes()


def stays(move: Move) -> None:
    """Check that the guest still runs where it was."""
    assert wait_until(lambda: move.source.machine.run_state is RunState.RUNNING)
    assert move.destination.machine.run_state is not RunState.RUNNING


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_it_needs_postcopy(pair: Pair) -> None:
    with pytest.raises(SettingsError, match="requires postcopy-ram"):
        pair.source().set_capabilities({"postcopy-preempt": True})


def test_a_transport_with_one_channel_is_refused(move: Move) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for one in (ours, theirs):
            one.set_inheritable(True)
        with pytest.raises(SettingsError, match=r"'fd:' has only one channel .*'postcopy-preempt'"):
            move.source.migrate(f"fd:{ours.fileno()}")
        with pytest.raises(SettingsError, match="'fd:' has only one channel"):
            move.destination.migrate_incoming(f"fd:{theirs.fileno()}")


def test_a_destination_without_it_is_found_out_before_any_page_is_sent(move: Move) -> None:
    move.destination.set_capabilities({"postcopy-preempt": False})
    move.begin()
    assert ended(move.source) == "failed"
    assert "switch capability 'postcopy-preempt' on there too" in (move.source.report().error or "")
    assert "ram" not in query_migrate(move.source)
    stays(move)


# -- what may come over the channel ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff" * 8, "expected a RAM record"),
        (EOS, "expected all pages of RAM block 'ram', got the end without"),
    ],
    ids=["garbage", "end"],
)
def test_what_is_no_requested_page_pauses_both_sides(
    move: Move, data: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The guest is stopped so that it requests nothing meanwhile, and continues afterwards."""
    move.source.stop()
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        move.reaches(move.destination, "postcopy-active")
        assert wait_until(lambda: move.destination.machine.run_state is RunState.PAUSED)
        assert wait_until(lambda: proxy.connections == 2)
        proxy.inject(data)
        move.destination.cont()
        assert wait_until(lambda: requests(move) > 0 or move.destination.incoming.status == "postcopy-paused")
        settled(partial(requests, move))  # a page that was sent over that channel is lost, and the guest waits for it
        move.hurry()
        move.both_reach("postcopy-paused")
        assert words in caplog.text
        recover(move)
        move.completes()


# -- who may open the channel ------------------------------------------------------------------------------------------

FORGED_PAGE = (RamFlag.PAGE).to_bytes(8) + b"\x03ram" + b"\xee" * 4096
STRANGERS = {
    "silent": b"",
    "garbage": b"GET / HTTP/1.0\r\n\r\n",
    "a page": FORGED_PAGE,
    "another migration's": b"MGRP" + bytes(16 + 32),
}


@pytest.mark.parametrize("words", STRANGERS.values(), ids=STRANGERS)
def test_strangers_who_connect_first_change_nothing(move: Move, words: bytes) -> None:
    """More strangers than are examined at once connect right before the source's channel, and stay."""
    address = move.destination.migrate_incoming(LISTEN)
    with contextlib.ExitStack() as strangers, CutProxy(address) as proxy:

        def come_first() -> None:
            if proxy.connections == 1:
                for _ in range(MOST + 1):
                    one = socket.create_connection(host_and_port(address))
                    strangers.enter_context(one).sendall(words)

        proxy.before_each = come_first
        move.limit()
        move.source.set_parameters({"max-postcopy-bandwidth": 64 << 10})
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        assert wait_until(partial(asks_again, move, 50)), "requested pages do not arrive"
        move.hurry()
        move.completes()
        assert proxy.connections == 2


def test_a_source_that_returns_is_not_taken_for_the_channel(move: Move) -> None:
    """During a recovery the stream breaks, unnoticed by the destination, before the channel of requested pages has
    connected. The source's next connection is the stream again."""
    address = move.destination.migrate_incoming(LISTEN)
    with CutProxy(address) as proxy, socket.create_server(("127.0.0.1", 0)) as elsewhere:

        def come_between() -> None:
            if proxy.connections == 3:
                proxy.lead_to(f"tcp:127.0.0.1:{elsewhere.getsockname()[1]}")
                proxy.cut(Cut.LOSE_FORWARD)
                proxy.cut(Cut.HALF_BACKWARD)
            elif proxy.connections == 4:
                proxy.lead_to(address)

        proxy.before_each = come_between
        move.source.set_parameters({"x-migfw-reconnect": -1})
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        move.both_reach("postcopy-active")
        proxy.cut_all(Cut.RESET)
        assert wait_until(lambda: proxy.connections >= 6), "the source did not come back"
        move.both_reach("postcopy-active")
        move.hurry()
        move.completes()
