"""corefw.net.relay: streams pass whole, ends as ends, breaks as breaks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from corefw.channel import Channel, Interrupt, receive_exactly
from corefw.errors import ChannelError, Interrupted, UsageError
from corefw.net import descriptors
from corefw.net.relay import Phase, Relay
from corefw.plugins import Plugins
from corefw.testing.ends import MIB, Flood, pattern, receive_all, same, send_chunks
from corefw.testing.tasks import Possessions, Task, private_memory, wait_until
from corefw.wire.constants import ReturnMessage
from corefw.wire.returnpath import encode_return_message, number_body
from tests.helpers.cli import Command, migfw, start

PLUGINS = Plugins()
NEVER = Interrupt()
"""An interrupt that is never set."""


class Joined:
    """A running relay between two tcp: peers."""

    def __init__(self) -> None:
        self.listener = PLUGINS.transport("tcp:127.0.0.1:0").listen()
        self.relay = Relay(PLUGINS.transport("tcp:127.0.0.1:0"), PLUGINS.transport(self.listener.uri))
        self.relay.start()
        assert self.relay.uri
        self.source = PLUGINS.transport(self.relay.uri).connect(NEVER)
        self.target = self.listener.accept(NEVER)

    def close(self) -> None:
        for thing in (self.source, self.target, self.relay, self.listener):
            thing.close()


@pytest.fixture
def joined() -> Iterator[Joined]:
    before = Possessions.now()
    made = Joined()
    yield made
    made.close()
    before.assert_no_more()


def passed(relay: Relay, count: int) -> bool:
    return relay.progress().forward == count


def send_and_end(channel: Channel, data: bytes) -> None:
    send_chunks(channel, data)
    channel.send_eof()


def test_both_ways_at_once(joined: Joined) -> None:
    there, back = pattern(16 * MIB), pattern(8 * MIB)
    tasks = [Task("there", send_and_end, joined.source, there), Task("back", send_and_end, joined.target, back)]
    received = [Task("received", receive_all, joined.target), Task("received back", receive_all, joined.source)]
    same(received[0].result(), there)
    same(received[1].result(), back)
    for task in tasks:
        task.result()
    assert joined.relay.wait(60)
    progress = joined.relay.progress()
    assert (progress.phase, progress.forward, progress.backward) == (Phase.DONE, len(there), len(back))
    assert joined.relay.failure is None
    assert progress.seconds > 0


@pytest.mark.parametrize("first", ["source", "target"])
def test_half_closes_in_either_order(joined: Joined, first: str) -> None:
    one, other = (joined.source, joined.target) if first == "source" else (joined.target, joined.source)
    one.send(b"last words")
    one.send_eof()
    same(Task("received", receive_all, other).result(), b"last words")
    assert not joined.relay.wait(0.1)
    other.send(b"an answer")
    other.send_eof()
    same(Task("answer received", receive_all, one).result(), b"an answer")
    assert joined.relay.wait(60)
    assert joined.relay.failure is None


def test_a_source_that_closes_when_it_has_its_answer(joined: Joined) -> None:
    """QEMU does not half-close: the destination sends SHUT and closes, and then the source closes."""
    joined.source.send(b"the stream")
    receive_exactly(joined.target, memoryview(bytearray(10)))
    joined.target.send(b"SHUT")
    joined.target.close()
    same(Task("SHUT", receive_all, joined.source).result(), b"SHUT")
    joined.source.close()
    assert joined.relay.wait(60)
    assert joined.relay.failure is None
    assert joined.relay.progress().backward == 4


@pytest.mark.parametrize(("broken", "side"), [("source", "FROM"), ("target", "TO")])
def test_a_break_is_passed_on_as_a_break(joined: Joined, broken: str, side: str) -> None:
    for channel, peer in ((joined.source, joined.target), (joined.target, joined.source)):
        channel.send(b"half")
        receive_exactly(peer, memoryview(bytearray(4)))
    breaks, hears = (joined.source, joined.target) if broken == "source" else (joined.target, joined.source)
    breaks.abort()
    breaks.close()
    with pytest.raises(ChannelError, match="the peer reset the connection"):
        Task("received", receive_all, hears).result()
    assert joined.relay.wait(60)
    assert joined.relay.progress().phase is Phase.FAILED
    assert f"the {side} side of the relay broke: tcp:127.0.0.1:" in str(joined.relay.failure)


# -- the destination's last word -----------------------------------------------------------------------------------

PONG = encode_return_message(ReturnMessage.PONG, number_body(1))
SHUT = encode_return_message(ReturnMessage.SHUT, number_body(0))
SHUT_1 = encode_return_message(ReturnMessage.SHUT, number_body(1))


@contextlib.contextmanager
def to_a_program() -> Iterator[tuple[Relay, Channel, socket.socket]]:
    """A relay, its source, and a bare socket as its destination. If that is closed with unread bytes, it resets the
    connection, as an ending program does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = PLUGINS.transport(f"tcp:127.0.0.1:{server.getsockname()[1]}")
        with Relay(PLUGINS.transport("tcp:127.0.0.1:0"), target) as relay:
            relay.start()
            assert relay.uri
            with PLUGINS.transport(relay.uri).connect(NEVER) as source, server.accept()[0] as program:
                yield relay, source, program


def test_a_destination_that_says_shut_and_closes_over_unread_bytes() -> None:
    """The destination has the guest, so neither the source nor the relay's caller gets an error."""
    with to_a_program() as (relay, source, program):
        flood = Flood(source, "sending", 256 << 10, 64 * MIB)
        assert flood.blocked() < 64 * MIB
        program.sendall(PONG + SHUT)
        program.close()
        same(Task("the answer", receive_all, source).result(), PONG + SHUT)
        flood.task.result()
        assert relay.wait(60)
        assert relay.failure is None
        assert relay.progress().phase is Phase.DONE


@pytest.mark.parametrize(
    ("said", "why"),
    [(PONG, "the TO side of the relay broke: tcp:"), (SHUT_1, "the destination reported that it failed")],
    ids=["none", "shut-1"],
)
def test_last_words_of_a_destination_that_fails(said: bytes, why: str) -> None:
    with to_a_program() as (relay, source, program):
        flood = Flood(source, "sending", 256 << 10, 64 * MIB)
        flood.blocked()
        program.sendall(said)
        program.close()
        assert isinstance(flood.task.error(), ChannelError)
        heard = memoryview(bytearray(len(said)))
        Task("last words", receive_exactly, source, heard).result()
        same(heard, said)
        with pytest.raises(ChannelError, match=r"the peer (reset|closed) the connection"):
            Task("then", source.receive_into, heard).result()
        assert relay.wait(60)
        assert str(relay.failure).startswith(why)
        assert relay.progress().phase is Phase.FAILED


@pytest.mark.parametrize(
    ("said", "why"),
    [(PONG, "without confirming that it has the guest"), (PONG + SHUT_1, "reported that it failed to load")],
    ids=["none", "shut-1"],
)
def test_orderly_ends_do_not_make_up_for_a_failed_migration(joined: Joined, said: bytes, why: str) -> None:
    joined.source.send(b"the stream")
    joined.target.send(said)
    joined.target.send_eof()
    same(Task("answers", receive_all, joined.source).result(), said)
    joined.source.close()
    same(Task("the stream", receive_all, joined.target).result(), b"the stream")
    assert joined.relay.wait(60)
    assert why in str(joined.relay.failure)
    assert joined.relay.progress().phase is Phase.FAILED


@pytest.mark.parametrize("broken", ["source", "target"])
def test_what_breaks_after_shut_breaks_nothing(joined: Joined, broken: str) -> None:
    joined.source.send(b"the stream")
    receive_exactly(joined.target, memoryview(bytearray(10)))
    joined.target.send(SHUT)
    receive_exactly(joined.source, memoryview(bytearray(8)))
    breaks, hears = (joined.source, joined.target) if broken == "source" else (joined.target, joined.source)
    breaks.abort()
    breaks.close()
    if broken == "target":
        same(Task("the end", receive_all, hears).result(), b"")
    hears.close()
    assert joined.relay.wait(60)
    assert joined.relay.failure is None


def test_a_source_that_waits_for_no_answer_is_passed_on_whole() -> None:
    with PLUGINS.transport("tcp:127.0.0.1:0").listen() as listener:
        target = PLUGINS.transport(listener.uri)
        with Relay(PLUGINS.transport("zmq:tcp://127.0.0.1:0"), target) as relay:
            relay.start()
            assert relay.uri
            data = pattern(4 * MIB)
            with PLUGINS.transport(relay.uri).connect(NEVER) as source:
                source.send(data)
            with listener.accept(NEVER) as destination:
                answers = Flood(destination, "answering", 256 << 10, 64 * MIB)
                answers.task.result()  # they go nowhere, but hold nothing up
                same(Task("the stream", receive_all, destination).result(), data)
            assert relay.wait(60)
            assert str(relay.failure).startswith("the FROM side of the relay broke: zmq:tcp://")


def test_abort_breaks_both_sides_off(joined: Joined) -> None:
    joined.source.send(b"half")
    receive_exactly(joined.target, memoryview(bytearray(4)))
    joined.relay.abort()
    joined.relay.abort()
    assert joined.relay.wait(60)
    assert isinstance(joined.relay.failure, Interrupted)
    for channel in (joined.source, joined.target):
        with pytest.raises(ChannelError, match="the peer reset the connection"):
            Task("received", receive_all, channel).result()


def test_a_slow_receiver_holds_the_sender_back(joined: Joined) -> None:
    before = private_memory()
    flood = Flood(joined.source, "sending", 256 << 10, 64 * MIB)
    assert flood.blocked() < 32 * MIB
    assert private_memory() - before < 16 * MIB
    received = Task("received", receive_all, joined.target).result()
    assert len(received) == flood.sent == 64 * MIB


def test_a_target_that_is_not_there_breaks_the_source_off() -> None:
    with Relay(PLUGINS.transport("tcp:127.0.0.1:0"), PLUGINS.transport("tcp:127.0.0.1:1")) as relay:
        relay.start()
        assert relay.uri
        transport = PLUGINS.transport(relay.uri)
        with (
            pytest.raises(ChannelError, match="the peer reset the connection"),
            transport.connect(NEVER) as source,  # may be told already here
        ):
            source.receive_into(memoryview(bytearray(1)))
        assert relay.wait(60)
        assert str(relay.failure).startswith("tcp:127.0.0.1:1: connection refused")


def test_a_cut_stream_makes_no_file(tmp_path: Path) -> None:
    target = PLUGINS.transport(f"file:{tmp_path}/stream")
    for cut in (True, False):
        with Relay(PLUGINS.transport("tcp:127.0.0.1:0"), target) as relay:
            relay.start()
            assert not relay.two_way
            assert relay.uri
            with PLUGINS.transport(relay.uri).connect(NEVER) as source:
                source.send(b"all of it")
                assert wait_until(partial(passed, relay, 9))
                if cut:
                    source.abort()
            assert relay.wait(60)
            assert (relay.failure is None) != cut
        assert [one.name for one in tmp_path.iterdir()] == ([] if cut else ["stream"])
    assert (tmp_path / "stream").read_bytes() == b"all of it"


def test_sources_that_are_there_already_run_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(pattern(MIB))
    with Relay(PLUGINS.transport(f"file:{tmp_path}/in"), PLUGINS.transport(f"exec:cat > {tmp_path}/out")) as relay:
        assert relay.listen() is None
        relay.run()
    assert (tmp_path / "out").read_bytes() == pattern(MIB)


def test_a_command_that_fails_fails_the_relay(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    relay = Relay(PLUGINS.transport(f"file:{tmp_path}/in"), PLUGINS.transport("exec:cat > /dev/null; exit 5"))
    with relay, pytest.raises(ChannelError, match=r"the TO side of the relay broke: exec:.*status 5"):
        relay.run()


def test_the_wrong_way_round() -> None:
    for name, fd in zip(("reader", "writer"), os.pipe(), strict=True):
        descriptors.put(name, fd)
    tcp = PLUGINS.transport("tcp:127.0.0.1:0")
    with pytest.raises(UsageError, match="it can only receive a migration"):
        Relay(tcp, PLUGINS.transport("fd:reader"))
    with pytest.raises(UsageError, match="it can only send a migration, not receive one"):
        Relay(PLUGINS.transport("fd:writer"), tcp)
    for name in ("reader", "writer"):
        left = descriptors.take(name)
        assert left is not None
        os.close(left)


# -- the command ---------------------------------------------------------------------------------------------------


def listening_at(process: Command, *, stderr: bool = False) -> str:
    stream = process.stderr if stderr else process.stdout
    assert stream
    line = stream.readline().removeprefix("migfw: ")
    assert line.startswith("listening at "), line
    return line.removeprefix("listening at ").strip()


def test_command_says_where_and_how_much(tmp_path: Path) -> None:
    with start("relay", "tcp:127.0.0.1:0", f"file:{tmp_path}/out") as process:
        with PLUGINS.transport(listening_at(process)).connect(NEVER) as source:
            send_and_end(source, pattern(MIB))
        out, err = process.finish()
    assert out.startswith("relayed 1.0 MiB in ")
    assert (process.returncode, err) == (0, "")
    assert (tmp_path / "out").read_bytes() == pattern(MIB)


def test_command_with_json(tmp_path: Path) -> None:
    with start("relay", "--json", "tcp:127.0.0.1:0", f"file:{tmp_path}/out") as process:
        with PLUGINS.transport(listening_at(process, stderr=True)).connect(NEVER) as source:
            send_and_end(source, b"12345")
        out, _ = process.finish()
    document = json.loads(out)
    assert document.pop("seconds") >= 0
    assert document == {
        "from": "tcp:127.0.0.1:0",
        "to": f"file:{tmp_path}/out",
        "status": "completed",
        "return-path": False,
        "forward-bytes": 5,
        "backward-bytes": 0,
    }


def test_command_fails_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    done = migfw("relay", f"file:{tmp_path}/in", "exec:cat > /dev/null; echo no tape >&2; exit 5", "--json")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("migfw: the TO side of the relay broke: exec:cat")
    assert "status 5: no tape" in json.loads(done.stdout)["error-desc"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("tcp:127.0.0.1", "file:/dev/null"), "has no port"),
        (("tcp:127.0.0.1:0", "nosuch:x"), "no installed plugin has the scheme 'nosuch'"),
        (("tcp:127.0.0.1:0", "file:/dev/null", "--param", "nosuch=1"), "unknown parameter 'nosuch'"),
        (("tcp:127.0.0.1:0",), "Missing argument 'TO'"),
        (("tcp:127.0.0.1:0", "tcp:127.0.0.1:0"), "'tcp:127.0.0.1:0': port 0 is only for listening"),
    ],
)
def test_command_used_wrongly(arguments: tuple[str, ...], expected: str) -> None:
    done = migfw("relay", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert expected in done.stderr


def test_command_ends_at_control_c(tmp_path: Path) -> None:
    with (
        start("relay", "tcp:127.0.0.1:0", f"file:{tmp_path}/out") as process,
        PLUGINS.transport(listening_at(process)).connect(NEVER) as source,
    ):
        source.send(b"half of it")
        assert wait_until(lambda: any(tmp_path.iterdir()))
        process.send_signal(signal.SIGINT)
        out, err = process.finish()
    assert (process.returncode, out, err.count("\n")) == (130, "", 1)
    assert err.startswith("migfw: interrupted after ")
    assert not any(tmp_path.iterdir())
