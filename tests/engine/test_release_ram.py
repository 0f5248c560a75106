"""The source frees its memory in postcopy (release-ram), but never the only copy of a page."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

import pytest

from corefw.engine.release import FIRST_PING
from corefw.errors import MachineError, StateError
from corefw.machine import RunState
from corefw.testing.tasks import wait_until
from corefw.wire.constants import PACKAGE_PING, Command, ReturnMessage
from corefw.wire.records import write_command
from corefw.wire.returnpath import encode_return_message, reason_body, recv_bitmap_body
from corefw.wire.stream import MemorySink, StreamWriter
from tests.helpers.cutting import Cut, CutProxy
from tests.helpers.engines import PATIENCE, Pair, Peer, ended, query_migrate
from tests.helpers.moving import LISTEN, Move
from tests.helpers.ram import allocated

PAGES = (32 << 20) // 4096


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    made = Move(pair)
    made.source.set_capabilities({"release-ram": True})
    yield made


def held(move: Move) -> int:
    """Number of pages that are allocated for the guest's RAM on the source."""
    return allocated(move.source.machine.ram_blocks()[0])


@pytest.mark.parametrize("preempt", [False, True])
def test_the_source_shrinks_while_it_sends(move: Move, preempt: bool) -> None:
    for engine in (move.source, move.destination):
        engine.set_capabilities({"postcopy-preempt": preempt})
    assert held(move) == PAGES
    move.switch()
    assert wait_until(lambda: 0 < held(move) < PAGES), "nothing was given back"
    assert move.source.outgoing.status == "postcopy-active"
    move.hurry()
    move.completes()
    assert held(move) == 0


def test_nothing_is_lost_when_the_connection_breaks(move: Move) -> None:
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        for _ in range(2):
            move.both_reach("postcopy-active")
            before = held(move)
            assert wait_until(lambda: held(move) < before), "nothing was given back"  # noqa: B023 - not kept
            proxy.cut(Cut.RESET)
            move.both_reach("postcopy-paused")
            proxy.lead_to(move.destination.recover(LISTEN))
            move.source.migrate(proxy.uri, resume=True)
        move.hurry()
        move.completes()


def test_a_guest_that_does_not_start_there_goes_on_here(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be refused after RUN, when much of its RAM has arrived on the destination."""
    proceed = threading.Event()

    def refuse() -> None:
        proceed.wait(PATIENCE)
        raise MachineError("it does not start here")

    monkeypatch.setattr(move.destination.machine, "start", refuse)
    before = held(move)
    move.hand_over()
    move.hurry()
    assert wait_until(lambda: query_migrate(move.source)["ram"]["postcopy-bytes"] > 12 << 20)
    assert held(move) == before
    proceed.set()
    assert ended(move.source) == "failed"
    assert "it does not start here" in (move.source.report().error or "")
    assert move.source.machine.run_state is RunState.RUNNING
    move.source.verify()


# -- a destination that lies -------------------------------------------------------------------------------------------


def takes_some(peer: Peer, move: Move) -> None:
    """Hand the guest over to a destination driven by the test, which confirms some of its pages."""
    move.source.set_parameters({"max-bandwidth": 0})
    move.source.migrate(peer.uri)
    move.source.start_postcopy()
    peer.accept()
    ping = command(Command.PING, FIRST_PING.to_bytes(4))
    peer.read_all(lambda data: ping in data)
    peer.say(ReturnMessage.PONG, PACKAGE_PING)
    before = held(move)
    peer.say(ReturnMessage.PONG, FIRST_PING)
    peer.read_while(lambda: held(move) == before)


def test_a_guest_whose_memory_is_gone_does_not_run_again(move: Move) -> None:
    with Peer() as peer:
        takes_some(peer, move)
        peer.send(encode_return_message(ReturnMessage.MIGFW_REASON, reason_body("changed my mind")))
        peer.say(ReturnMessage.SHUT, 1)
        assert ended(move.source) == "failed"
    assert "changed my mind" in (move.source.report().error or "")
    assert move.source.machine.run_state is RunState.POSTMIGRATE
    for call in (move.source.cont, lambda: move.source.migrate("tcp:127.0.0.1:1")):
        with pytest.raises(StateError, match="release-ram"):
            call()


def test_a_destination_that_has_lost_what_it_confirmed_is_not_believed(move: Move) -> None:
    with Peer() as peer:
        takes_some(peer, move)
    move.reaches(move.source, "postcopy-paused")
    with Peer() as peer:
        move.source.migrate(peer.uri, resume=True)
        peer.accept(answer=False)
        peer.read_all(lambda data: command(Command.RECV_BITMAP, recv_bitmap_body("ram")) in data)
        bitmap = struct.pack(">Q", PAGES // 8) + bytes(PAGES // 8) + struct.pack(">Q", 0x0123456789ABCDEF)
        peer.send(encode_return_message(ReturnMessage.RECV_BITMAP, recv_bitmap_body("ram")) + bitmap)
        assert wait_until(lambda: "had confirmed" in (move.source.report().error or "")), move.source.report()
        move.reaches(move.source, "postcopy-paused")


def command(number: Command, payload: bytes) -> bytes:
    """A command as bytes of the stream."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_command(writer, number, payload)
    writer.flush()
    return bytes(sink.data)
