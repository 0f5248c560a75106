"""Peers that misbehave in postcopy: the guest survives on the side that has it."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corefw.machine import RunState
from corefw.testing.tasks import wait_until
from corefw.wire.constants import BE64, PACKAGE_PING, RESUMED, Command, RamFlag, ReturnMessage, SectionType
from corefw.wire.records import (
    Configuration,
    Discard,
    PostcopyAdvice,
    discard_payload,
    postcopy_advise_payload,
    write_command,
    write_configuration,
    write_header,
    write_package,
)
from corefw.wire.returnpath import (
    PageRequest,
    encode_return_message,
    number_body,
    page_request_message,
    reason_body,
    recv_bitmap_body,
)
from corefw.wire.stream import MemorySink, StreamWriter
from tests.helpers.cutting import CutProxy, Watch, host_and_port
from tests.helpers.engines import READY, Pair, Peer, arrived, ended, query_migrate
from tests.helpers.moving import LEISURELY, LISTEN, Move

RESUME = bytes((SectionType.COMMAND, 0, Command.POSTCOPY_RESUME))
RECV_BITMAP = bytes((SectionType.COMMAND, 0, Command.RECV_BITMAP))
ADVICE = postcopy_advise_payload(PostcopyAdvice(4096, 4096))
HUGE = postcopy_advise_payload(PostcopyAdvice(2 << 20, 4096))


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    yield Move(pair)


BITMAP = encode_return_message(ReturnMessage.RECV_BITMAP, recv_bitmap_body("ram"))
"""A bitmap follows."""


NOTHING_ARRIVED = struct.pack(">Q", 1024) + bytes(1024) + struct.pack(">Q", 0x0123456789ABCDEF)
THE_END = re.compile(rb"\x03(....)\0{7}\x10\x7e\1\0\Z", re.DOTALL)
"""The last section, its footer, and EOF."""
FAR = 24 << 20
"""Far behind the start of the block, where the background stream begins."""


# -- a source ----------------------------------------------------------------------------------------------------------


def written(write: Callable[[StreamWriter], object]) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    write(writer)
    writer.flush()
    return bytes(sink.data)


def command(number: Command, payload: bytes = b"") -> bytes:
    return written(lambda writer: write_command(writer, number, payload))


def package(*commands: bytes) -> bytes:
    return written(lambda writer: write_package(writer, b"".join(commands)))


DISCARD = discard_payload(Discard("ram", ((0, 4096),)))
LISTENING = command(Command.POSTCOPY_LISTEN)
RUN = command(Command.POSTCOPY_RUN)


def head(move: Move, *commands: bytes) -> bytes:
    """The beginning of a stream."""
    configuration = Configuration(move.destination.machine.name, b"")
    begun = written(write_header) + written(lambda writer: write_configuration(writer, configuration))
    return begun + command(Command.OPEN_RETURN_PATH) + b"".join(commands)


def beginning(move: Move) -> bytes:
    """The stream of a real source up to the START sections."""
    with Peer() as peer:
        move.source.migrate(peer.uri)
        peer.accept(answer=False)
        data = peer.read_all(lambda data: READY in data)
    assert ended(move.source) == "failed"
    return data[: data.index(READY)]


def fails_with(move: Move, stream: bytes, words: str) -> None:
    """Check that the destination reports this error and starts no guest."""
    with socket.create_connection(host_and_port(move.destination.migrate_incoming(LISTEN))) as connection:
        with contextlib.suppress(ConnectionError):  # it was refused before all of it was sent
            connection.sendall(stream)
            connection.shutdown(socket.SHUT_WR)
        assert arrived(move.destination) == "failed"
    assert words in (move.destination.report().error or "")
    assert move.destination.machine.run_state is RunState.INMIGRATE


FIRST_COMMANDS = [
    (command(Command.POSTCOPY_RAM_DISCARD, DISCARD), "POSTCOPY_ADVISE before it"),
    (package(LISTENING), "POSTCOPY_ADVISE before it"),
    (RUN, "POSTCOPY_LISTEN before it"),
    (command(Command.POSTCOPY_ADVISE) + package(LISTENING), "a live section"),
    (command(Command.POSTCOPY_ADVISE) + command(Command.POSTCOPY_RAM_DISCARD, DISCARD), "POSTCOPY_ADVISE before it"),
    (command(Command.POSTCOPY_ADVISE, HUGE), "pages of 4096 bytes"),
    (command(Command.POSTCOPY_ADVISE, ADVICE) + package(LISTENING), "a live section"),
    (command(Command.PACKAGED, struct.pack(">I", 1 << 31)), "at most 67108864 bytes"),
]
SWITCHOVERS = [
    (command(Command.POSTCOPY_RAM_DISCARD, b"\1"), "RAM_DISCARD: expected a version"),
    (command(Command.POSTCOPY_RAM_DISCARD, discard_payload(Discard("rom", ()))), "name of a RAM block"),
    (command(Command.POSTCOPY_RAM_DISCARD, discard_payload(Discard("ram", ((1, 4096),)))), "whole pages"),
    (command(Command.POSTCOPY_RAM_DISCARD, discard_payload(Discard("ram", ((32 << 20, 4096),)))), "whole pages"),
    (command(Command.POSTCOPY_RAM_DISCARD, discard_payload(Discard("ram", ((0, 33 << 20),)))), "whole pages"),
    (command(Command.PACKAGED, struct.pack(">I", 4096)) + LISTENING, "4096 bytes of a package"),
    (command(Command.RECV_BITMAP, recv_bitmap_body("ram")), "got 'ram'"),
    (command(Command.POSTCOPY_RESUME), "a postcopy that was interrupted"),
    (package(LISTENING, LISTENING), "before POSTCOPY_LISTEN"),
    (package(LISTENING, command(Command.POSTCOPY_RAM_DISCARD, DISCARD)), "before POSTCOPY_LISTEN"),
    (package(package()), "no package within a package"),
    (package(LISTENING, RUN, b"\0"), "the end of the package"),
    (package(LISTENING, RUN), "the END of section"),
]


def test_streams_whose_commands_make_no_sense(move: Move) -> None:
    """Each is refused, and then the guest arrives all the same."""
    for commands, words in FIRST_COMMANDS:
        fails_with(move, head(move, commands), words)
    begun = beginning(move)
    for commands, words in SWITCHOVERS:
        fails_with(move, begun + commands, words)
    move.switch()
    move.hurry()
    move.completes()


def recorded(move: Move) -> bytes:
    """The stream of a migration that may switch to postcopy, and does not."""
    with CutProxy(move.destination.migrate_incoming(LISTEN), record=True) as proxy:
        move.source.migrate(proxy.uri)
        move.completes()
    return bytes(proxy.recorded)


def test_a_stream_that_is_whole_but_not_run(pair: Pair) -> None:
    """Its guest would wait for pages that never come."""
    stream = recorded(Move(pair))
    at, first = stream.index(READY), stream.index(bytes((SectionType.START, 0, 0, 0)))
    move = Move(pair)
    fails_with(move, stream[:at] + package(LISTENING) + stream[at:], "expected POSTCOPY_RUN")
    run_first = package(stream[first:at], LISTENING, RUN)
    fails_with(move, stream[:first] + run_first + stream[at:], "the sections before POSTCOPY_RUN")


# -- a destination -----------------------------------------------------------------------------------------------------


def takes_guest(peer: Peer, move: Move) -> bytes:
    """Let the source hand the guest over to a destination driven by the test; return the bytes from the package on."""
    sent = move.hand_over_to(peer)
    peer.say(ReturnMessage.PONG, PACKAGE_PING)
    return sent


def lets_resume(peer: Peer, move: Move, *, answer: bytes = BITMAP + NOTHING_ARRIVED) -> None:
    """Let the source resume at this destination, which answers RECV_BITMAP with these bytes."""
    move.source.migrate(peer.uri, resume=True)
    peer.accept(answer=False)
    peer.read_all(lambda data: RECV_BITMAP in data)
    peer.send(answer)


BAD_MESSAGES = [
    (page_request_message(PageRequest(0, 4096, "rom")), "one of the RAM blocks ram, got 'rom'"),
    (page_request_message(PageRequest(0, 4096)), "one of the RAM blocks ram, got ''"),
    (page_request_message(PageRequest(1, 4096, "ram")), "whole pages"),
    (page_request_message(PageRequest(32 << 20, 4096, "ram")), "whole pages"),
    (page_request_message(PageRequest(0, 0, "ram")), "whole pages"),
    (encode_return_message(ReturnMessage.SHUT, bytes(4)), "before everything was sent"),
    (b"\xff" * 4, "type 65535"),
]
BAD_BITMAPS = [
    (encode_return_message(ReturnMessage.RECV_BITMAP, recv_bitmap_body("rom")), "bitmap of RAM block 'ram'"),
    (BITMAP + struct.pack("<Q", 1024) + NOTHING_ARRIVED[8:], "a received bitmap of 1024 bytes"),
    (BITMAP + struct.pack(">Q", 8) + bytes(16), "a received bitmap of 1024 bytes"),
    (BITMAP + NOTHING_ARRIVED[:-1] + b"\0", "end mark"),
]


def test_messages_that_make_no_sense_only_pause(move: Move) -> None:
    """Each pauses the source, which can go on afterwards and has lost nothing."""
    with Peer() as peer:
        takes_guest(peer, move)
    for message, words in BAD_MESSAGES:
        move.reaches(move.source, "postcopy-paused")
        with Peer() as peer:
            lets_resume(peer, move)
            peer.read_all(lambda data: RESUME in data)
            peer.say(ReturnMessage.RESUME_ACK, RESUMED)
            move.reaches(move.source, "postcopy-active")
            peer.send(message)
            move.reaches(move.source, "postcopy-paused")
        assert words in (move.source.report().error or "")
    for answer, words in BAD_BITMAPS:
        with Peer() as peer:
            lets_resume(peer, move, answer=answer)
            move.reaches(move.source, "postcopy-paused")
        assert words in (move.source.report().error or "")
    assert move.source.machine.run_state is RunState.FINISH_MIGRATE


def test_a_recovery_that_is_not_acknowledged_pauses_again(move: Move) -> None:
    """RESUME_ACK with another value does not count."""
    with Peer() as peer:
        takes_guest(peer, move)
    move.reaches(move.source, "postcopy-paused")
    with Peer() as peer:
        lets_resume(peer, move)
        peer.read_all(lambda data: RESUME in data)
        move.source.set_parameters({"x-migfw-confirm-timeout": 300})
        peer.say(ReturnMessage.RESUME_ACK, RESUMED + 1)
        move.reaches(move.source, "postcopy-paused")
    assert "POSTCOPY_RESUME" in (move.source.report().error or "")


def test_a_stranger_that_reports_a_failure_does_not_end_the_migration(move: Move) -> None:
    """It may not be the destination that has the guest: without a secret that cannot be known."""
    with Peer() as peer:
        takes_guest(peer, move)
    reason = encode_return_message(ReturnMessage.MIGFW_REASON, reason_body("no such guest"))
    for words in (b"", reason):
        move.reaches(move.source, "postcopy-paused")
        with Peer() as peer:
            move.source.migrate(peer.uri, resume=True)
            peer.accept(answer=False)
            peer.send(words + encode_return_message(ReturnMessage.SHUT, number_body(1)))
            assert wait_until(lambda: "failed to load" in (move.source.report().error or ""))
            move.reaches(move.source, "postcopy-paused")
    assert move.source.machine.run_state is RunState.FINISH_MIGRATE


def test_a_stranger_that_confirms_the_guest_does_not_end_the_migration(move: Move) -> None:
    """Everything was sent to a QEMU, and may be lost. A QEMU that has ended would say nothing either."""
    with Peer() as peer:
        move.hand_over_to(peer)
        move.hurry()
        last = b""
        while not THE_END.search(last):
            last = (last + peer.read_all(bool))[-32:]
    move.reaches(move.source, "postcopy-paused")
    with Peer() as stranger:
        move.source.migrate(stranger.uri, resume=True)
        stranger.accept(answer=False)
        stranger.say(ReturnMessage.SHUT, 0)
        assert wait_until(lambda: "before everything was sent" in (move.source.report().error or ""))
    move.reaches(move.source, "postcopy-paused")


FLOOD = 20_000
"""Requests."""
KEPT = 2 << 20
"""Bytes: less than it would take to remember each of them."""
REQUEST = page_request_message(PageRequest(0, 4096, "ram"))[:4]
"""What the first request of a page begins with."""


def flood(pages: int) -> bytes:
    """Requests of these pages, again and again, from FAR on."""
    one_by_one = [PageRequest(FAR + number % pages * 4096, 4096, "ram") for number in range(FLOOD)]
    return b"".join(map(page_request_message, one_by_one))


def test_a_flood_of_requests_is_remembered_and_served_once(move: Move) -> None:
    """It comes while the source can send nothing more, for nothing is read."""
    with Peer() as peer:
        sent = takes_guest(peer, move)
        data = page_request_message(PageRequest(0, 12 << 20, "ram")) + flood(1024)
        descriptors = count_descriptors()
        tracemalloc.start()
        try:
            peer.send(data)
            assert wait_until(lambda: query_migrate(move.source)["ram"]["postcopy-requests"] > FLOOD)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < KEPT
        assert wait_until(lambda: count_descriptors() <= descriptors)
        sent += peer.read_all(lambda data: len(data) >= 16 << 20)
        headers = [BE64.pack(FAR | flags) for flags in (RamFlag.PAGE, RamFlag.PAGE | RamFlag.CONTINUE)]
        assert sum(map(sent.count, headers)) == 1
        assert move.source.outgoing.status == "postcopy-active"


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("preempt", [False, True])
def test_a_flood_of_requests_does_no_harm(pair: Pair, preempt: bool) -> None:
    """It comes in the middle of a move, from what claims to be the destination."""
    move = Move(pair, *LEISURELY)
    for engine in (move.source, move.destination):
        engine.set_capabilities({"postcopy-preempt": preempt})
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        proxy.stop_at(Watch(False, re.compile(re.escape(REQUEST)), 0, lambda: proxy.answer(flood(2048))))
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        assert wait_until(lambda: query_migrate(move.source).get("ram", {}).get("postcopy-requests", 0) > FLOOD)
        move.hurry()
        move.completes()
