"""Messages beside the stream: PINGs and their PONGs, the reason for a failure, SHUT."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

import pytest

from corefw.machine import MachineConfig, RunState
from corefw.net.relay import Relay
from corefw.states import MigrationStatus
from corefw.wire.constants import MIGFW_PING, ReturnMessage
from corefw.wire.returnpath import encode_return_message, number_body, parse_reason, reason_body
from corefw.wire.vmstate import Kind, Scalar, VMState
from tests.helpers.engines import (
    PATIENCE,
    PING,
    RAM,
    READY,
    Pair,
    Peer,
    arrived,
    counting,
    ended,
    query_migrate,
    runs_on,
)
from tests.helpers.machines import CountingMachine

PAGE_MARK = b"a page of the guest"
END_OF_DESCRIPTION = b"}]}"


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


def marked(**more: object) -> CountingMachine:
    machine = CountingMachine(**more)  # type: ignore[arg-type]
    machine.block.view[4096 + 8 : 4096 + 8 + len(PAGE_MARK)] = PAGE_MARK
    return machine


# -- nothing of RAM before the destination has accepted the sections ---------------------------------------------------


def test_no_ram_is_sent_before_the_destination_has_answered(pair: Pair, peer: Peer) -> None:
    source = pair.source(marked())
    source.set_parameters({"max-bandwidth": 64 << 10})  # so that it can still be cancelled when the first page is there
    source.migrate(peer.uri)
    connection = peer.accept(answer=False)
    begun = peer.read_all(lambda data: READY in data)
    assert RAM in begun and begun.endswith(READY)
    assert PING + number_body(1) in begun and PING + number_body(MIGFW_PING) in begun
    assert not select.select([connection], [], [], 0.5)[0], "it sends more before it was answered"
    assert source.outgoing.status == "setup" and source.machine.run_state is RunState.RUNNING
    for ping in (begun[at + 5 : at + 9] for at in range(len(begun)) if begun.startswith(PING, at)):
        connection.sendall(encode_return_message(ReturnMessage.PONG, ping))
    assert PAGE_MARK in peer.read_all(lambda data: PAGE_MARK in data)
    source.cancel()
    assert ended(source) == "cancelled"
    runs_on(source)


def test_a_destination_that_refuses_a_section_gets_no_ram(pair: Pair) -> None:
    """The RAM has another size: the destination reports that before any page is sent, and the source shows it."""
    source, destination = pair.source(CountingMachine(pages=4096)), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert (ended(source), arrived(destination)) == ("failed", "failed")
    assert "RAM block 'counters' of 262144 bytes" in query_migrate(source)["error-desc"]
    assert "active" not in pair.statuses("failed")
    runs_on(source)


def test_a_wait_for_the_first_answer_can_be_cancelled_and_is_limited(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.migrate(peer.uri)
    first = peer.accept(answer=False)
    peer.read_all(lambda data: READY in data)
    source.cancel()
    assert ended(source) == "cancelled"
    first.close()
    source.set_parameters({"x-migfw-confirm-timeout": 300})
    source.migrate(peer.uri)
    peer.accept(answer=False)
    assert ended(source) == "failed"
    assert "did not answer" in query_migrate(source)["error-desc"]
    assert "x-migfw-confirm-timeout" in query_migrate(source)["error-desc"]
    runs_on(source)


# -- the end ---------------------------------------------------------------------------------------------------------


def test_a_destination_that_never_confirms_is_given_up_and_the_guest_stays_stopped(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.migrate(peer.uri)
    peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    source.set_parameters({"x-migfw-confirm-timeout": 500})
    assert ended(source) == "failed"
    reason = query_migrate(source)["error-desc"]
    assert "did not confirm that it has the guest within 0.5 s (parameter x-migfw-confirm-timeout)" in reason
    assert "may be running the guest, so it stays stopped here ('cont' starts it" in reason
    assert source.machine.run_state is RunState.POSTMIGRATE and counting(source).starts == 1


def test_the_limit_may_be_set_while_the_source_waits(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.set_parameters({"x-migfw-confirm-timeout": 0})
    source.migrate(peer.uri)
    peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    assert not source.outgoing.wait(frozenset({MigrationStatus.FAILED}), 0.5)
    source.set_parameters({"x-migfw-confirm-timeout": 1})
    assert ended(source) == "failed"


def test_a_parked_machine_is_to_be_migrated_again(pair: Pair, peer: Peer, tmp_path: object) -> None:
    """It has no 'cont', so the error must not suggest it."""
    donor = pair.source()
    donor.set_capabilities({"return-path": False})
    parked = pair.engine(pair.plugins.machine("qemu", MachineConfig(incoming=True)), {})
    donor.migrate(parked.migrate_incoming("tcp:127.0.0.1:0"))
    assert arrived(parked) == "completed", query_migrate(parked)
    parked.migrate(peer.uri)
    peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    parked.set_parameters({"x-migfw-confirm-timeout": 500})
    assert ended(parked) == "failed"
    reason = query_migrate(parked)["error-desc"]
    assert "migrate it again" in reason and "cont" not in reason, reason


# -- reasons -----------------------------------------------------------------------------------------------------------


def reason_at_source(pair: Pair, source: CountingMachine, destination: CountingMachine) -> str:
    here, there = pair.source(source), pair.destination(destination)
    here.migrate(there.migrate_incoming("tcp:127.0.0.1:0"))
    assert (ended(here), arrived(there)) == ("failed", "failed")
    reason = query_migrate(here)["error-desc"]
    assert isinstance(reason, str)
    assert reason.endswith(query_migrate(there)["error-desc"].removeprefix("load of migration failed: ")), reason
    runs_on(here)
    return reason


def test_the_source_shows_why_the_destination_failed(pair: Pair) -> None:
    """Even if the machine types differ, which is found before the source identifies itself as a migfw."""
    reason = reason_at_source(pair, CountingMachine(name="this"), CountingMachine(incoming=True, name="that"))
    assert "expected a machine 'that', got 'this'" in reason
    newer = VMState("counter", version_id=3, minimum_version_id=2, fields=(Scalar("writes", Kind.U64),))
    reason = reason_at_source(pair, CountingMachine(table=newer), CountingMachine(incoming=True))
    assert "version 3" in reason


def test_a_source_that_is_no_migfw_gets_no_reason(pair: Pair, peer: Peer) -> None:
    """A QEMU would refuse the message, and its guest would stay stopped."""
    source, destination = pair.source(CountingMachine(block="other")), pair.destination()
    source.migrate(peer.uri)
    peer.accept(answer=False)
    begun = peer.read_all(lambda data: READY in data).replace(PING + number_body(MIGFW_PING), b"")
    host, _, port = destination.migrate_incoming("tcp:127.0.0.1:0").removeprefix("tcp:").rpartition(":")
    with socket.create_connection((host, int(port))) as qemu:
        qemu.settimeout(PATIENCE)
        qemu.sendall(begun)
        answer = b""
        while more := qemu.recv(1 << 16):
            answer += more
    assert answer == encode_return_message(ReturnMessage.PONG, number_body(1)) + encode_return_message(
        ReturnMessage.SHUT, number_body(1)
    )
    source.cancel()
    ended(source)


HOSTILE = {
    "several lines and control characters": (b"one\n\x1b[31mtwo\x07", r"one \x1b[31mtwo\x07"),
    "no UTF-8": (b"\xff\xfe bad", "\ufffd\ufffd bad"),
    "nothing": (b"", "(status 1; its log says why)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_reason_is_shown_as_one_printable_line(pair: Pair, peer: Peer, case: str) -> None:
    said, shown = HOSTILE[case]
    source = pair.source()
    source.migrate(peer.uri)
    connection = peer.accept()
    connection.sendall(encode_return_message(ReturnMessage.MIGFW_REASON, said))
    peer.say(ReturnMessage.SHUT, 1)
    assert ended(source) == "failed"
    reason = query_migrate(source)["error-desc"]
    assert reason.endswith(shown), reason
    assert "\n" not in reason and "\x1b" not in reason
    runs_on(source)


def test_a_reason_that_is_too_long_is_refused_and_a_long_one_of_ours_is_cut(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.set_parameters({"max-bandwidth": 64 << 10})  # so that it has not sent everything when the reason is there
    source.migrate(peer.uri)
    connection = peer.accept()
    connection.sendall(ReturnMessage.MIGFW_REASON.to_bytes(2, "big") + (501).to_bytes(2, "big") + b"x" * 501)
    assert ended(source) == "failed"
    assert "at most 500 bytes" in query_migrate(source)["error-desc"]
    runs_on(source)
    ours = reason_body("expected ü" * 200)
    assert len(ours) <= 500 and ours.endswith(b"...") and parse_reason(ours).startswith("expected ü")


def test_a_reason_alone_is_no_end(pair: Pair, peer: Peer) -> None:
    """Only SHUT ends the return path: after a reason, SHUT 0 still means that the guest has arrived."""
    source = pair.source()
    source.migrate(peer.uri)
    connection = peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    connection.sendall(encode_return_message(ReturnMessage.MIGFW_REASON, b"nothing at all"))
    peer.say(ReturnMessage.SHUT, 0)
    assert ended(source) == "completed"


# -- through a relay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [True, False])
def test_what_they_say_passes_a_relay(pair: Pair, fits: bool) -> None:
    source = pair.source()
    destination = pair.destination(CountingMachine(64 if fits else 128, incoming=True))
    relay = Relay(
        pair.plugins.transport("tcp:127.0.0.1:0"),
        pair.plugins.transport(destination.migrate_incoming("tcp:127.0.0.1:0")),
    )
    with contextlib.closing(relay):
        relay.start()
        assert relay.uri is not None
        source.migrate(str(relay.uri))
        expected = "completed" if fits else "failed"
        assert (ended(source), arrived(destination)) == (expected, expected)
        assert relay.wait(PATIENCE)
    if fits:
        runs_on(destination)
    else:
        assert "RAM block 'counters' of 524288 bytes" in query_migrate(source)["error-desc"]
        runs_on(source)
