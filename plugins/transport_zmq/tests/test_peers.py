"""Peers that vanish, are too many, have no key, or are not migfw, over real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.auth
from corefw_transport_zmq import ZmqTransport, transport
from corefw_transport_zmq.protocol import CHUNK, WINDOW, Kind, Message, greeting, write_header
from corefw_transport_zmq.serving import BACKLOG

from corefw.channel import Channel, Interrupt, Listener, TransportContext, receive_exactly
from corefw.errors import ChannelError, Interrupted
from corefw.testing.ends import pattern
from corefw.testing.tasks import Task, wait_until
from corefw.uri import MigrationUri

ANY = "zmq:tcp://127.0.0.1:0"


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    made = Interrupt()
    yield made
    made.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with zmq_transport(ANY).listen() as listening:
        yield listening


def zmq_transport(uri: object) -> ZmqTransport:
    return ZmqTransport(MigrationUri.parse(str(uri)), TransportContext())


def pair(listener: Listener, interrupt: Interrupt) -> tuple[Channel, Channel]:
    return zmq_transport(listener.uri).connect(interrupt), listener.accept(interrupt)


def endpoint(listener: Listener) -> str:
    return str(listener.uri).removeprefix("zmq:")


def expect(channel: Channel, data: bytes) -> None:
    room = bytearray(len(data))
    receive_exactly(channel, memoryview(room))
    assert room == data


@contextlib.contextmanager
def raw(kind: int) -> Iterator[zmq.Socket[bytes]]:
    """A bare ZeroMQ socket."""
    context = zmq.Context()
    bare = context.socket(kind)
    bare.rcvtimeo = 60_000
    try:
        yield bare
    finally:
        context.destroy(0)


# -- peers that vanish -----------------------------------------------------------------------------------------------


PEER = """
import sys
from corefw.channel import Interrupt, TransportContext
from corefw.uri import MigrationUri
from corefw_transport_zmq import ZmqTransport
transport = ZmqTransport(MigrationUri.parse(sys.argv[2]), TransportContext())
if sys.argv[1] == "dial":
    channel = transport.connect(Interrupt())
else:
    listener = transport.listen()
    print(listener.uri, flush=True)
    channel = listener.accept(Interrupt())
channel.send(b"half of it")
while True:
    channel.send(bytes(65536))
"""


@contextlib.contextmanager
def peer(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that keeps sending."""
    with subprocess.Popen([sys.executable, "-c", PEER, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("we_dial", [True, False])
def test_a_peer_that_is_killed_is_no_end(we_dial: bool, listener: Listener, interrupt: Interrupt) -> None:
    with peer("listen", ANY) if we_dial else peer("dial", str(listener.uri)) as process:
        if we_dial:
            assert process.stdout
            channel = zmq_transport(process.stdout.readline().strip()).connect(interrupt)
        else:
            channel = Task("accept", listener.accept, interrupt).result()
        with channel:
            expect(channel, b"half of it")
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(ChannelError, match="the connection to the peer was lost"):
                while channel.receive_into(memoryview(bytearray(1 << 20))):
                    pass
            with pytest.raises(ChannelError, match="the connection to the peer was lost"):
                channel.send(b"x")


def test_a_killed_peer_frees_a_blocked_sender(listener: Listener, interrupt: Interrupt) -> None:
    with peer("dial", str(listener.uri)) as process:
        channel = Task("accept", listener.accept, interrupt).result()
        with channel:
            sending = Task("sending", lambda: [channel.send(pattern(1 << 20)) for _ in range(1000)])
            sending.let_block(0.2)
            assert sending.running
            process.kill()
            error = sending.error()
            assert type(error) is ChannelError and "was lost" in str(error)


# -- several peers, and none -----------------------------------------------------------------------------------------


def test_every_peer_is_a_stream_of_its_own(listener: Listener, interrupt: Interrupt) -> None:
    pairs = [pair(listener, interrupt) for _ in range(5)]
    for number, (out, _) in enumerate(pairs):
        out.send(b"from %d" % number)
    for number, (out, into) in enumerate(pairs):
        expect(into, b"from %d" % number)
        into.send(b"back to %d" % number)
        expect(out, b"back to %d" % number)
        out.close()
        into.close()


def test_too_many_that_wait_are_refused(listener: Listener, interrupt: Interrupt) -> None:
    dialled = [zmq_transport(listener.uri).connect(interrupt) for _ in range(BACKLOG)]
    with pytest.raises(ChannelError, match="the listener refuses: too many wait to be accepted"):
        zmq_transport(listener.uri).connect(interrupt)
    with listener.accept(interrupt), zmq_transport(listener.uri).connect(interrupt):
        pass
    for channel in dialled:
        channel.close()


def test_a_closed_listener_with_a_channel_refuses_newcomers(listener: Listener, interrupt: Interrupt) -> None:
    out, into = pair(listener, interrupt)
    listener.close()
    with pytest.raises(ChannelError, match="the listener refuses: it is no longer listening"):
        zmq_transport(listener.uri).connect(interrupt)
    with pytest.raises(ChannelError, match="is no longer listening"):
        listener.accept(interrupt)
    out.send(b"still here")
    expect(into, b"still here")
    out.close()
    into.close()


def test_those_who_were_never_accepted_learn_of_it(listener: Listener, interrupt: Interrupt) -> None:
    with zmq_transport(listener.uri).connect(interrupt) as waiting:
        listener.close()
        with pytest.raises(ChannelError):
            waiting.receive_into(memoryview(bytearray(1)))


def test_wildcards_report_what_they_got(interrupt: Interrupt) -> None:
    with zmq_transport("zmq:tcp://*:*").listen() as listening:
        port = str(listening.uri).rpartition(":")[2]
        assert str(listening.uri) == f"zmq:tcp://*:{port}" and int(port)
        for host in ("127.0.0.1", "localhost", "*"):
            out = zmq_transport(f"zmq:tcp://{host}:{port}").connect(interrupt)
            with out, listening.accept(interrupt) as into:
                into.send(b"x")
                expect(out, b"x")


def test_a_socket_file_is_removed_and_never_stolen(short_folder: Path, interrupt: Interrupt) -> None:
    path = short_folder / "s"
    with zmq_transport(f"zmq:ipc://{path}").listen() as listening:
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ChannelError, match="the address is in use"):
            zmq_transport(f"zmq:ipc://{path}").listen()
        out, into = pair(listening, interrupt)
        listening.close()
        assert not path.exists()
        with zmq_transport(f"zmq:ipc://{path}").listen():
            out.close()
            into.close()
            assert not wait_until(lambda: not path.exists(), 0.5)
    assert not path.exists()
    with zmq_transport(f"zmq:ipc://@migfw-test-{os.getpid()}").listen() as abstract:
        for channel in pair(abstract, interrupt):
            channel.close()


# -- CURVE -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Keys for server, friend and stranger; in/ authorizes the friend."""
    for name in ("server", "friend", "stranger"):
        zmq.auth.create_certificates(tmp_path, name)
    (tmp_path / "in").mkdir()
    (tmp_path / "friend.key").rename(tmp_path / "in" / "friend.key")
    return tmp_path


DIALS = {
    "?key={0}/friend.key_secret&server-key={0}/server.key": None,
    "?key={0}/stranger.key_secret&server-key={0}/server.key": "the listener rejected our key",
    "?key={0}/friend.key_secret&server-key={0}/stranger.key": "the handshake failed",
    "": "the handshake failed",
}


@pytest.mark.parametrize("query", DIALS)
def test_only_friends_come_in(query: str, keys: Path, interrupt: Interrupt) -> None:
    with zmq_transport(f"{ANY}?key={keys}/server.key_secret&authorized={keys}/in").listen() as listening:
        place = str(listening.uri).partition("?")[0]
        dialling = zmq_transport(place + query.format(keys))
        if DIALS[query] is None:
            out = dialling.connect(interrupt)
            with out, listening.accept(interrupt) as into:
                out.send(b"secret")
                expect(into, b"secret")
        else:
            with pytest.raises(ChannelError, match=DIALS[query]) as caught:
                dialling.connect(interrupt)
            assert str(caught.value).startswith(place)


def test_a_friend_does_not_talk_to_a_listener_without_keys(
    keys: Path, listener: Listener, interrupt: Interrupt
) -> None:
    query = f"?key={keys}/friend.key_secret&server-key={keys}/server.key"
    with pytest.raises(ChannelError, match="the handshake failed"):
        zmq_transport(f"{listener.uri}{query}").connect(interrupt)


# -- peers that are something else -----------------------------------------------------------------------------------


def test_strangers_do_not_disturb_a_listener(listener: Listener, interrupt: Interrupt) -> None:
    out, into = pair(listener, interrupt)
    with contextlib.ExitStack() as stack:
        for kind in (zmq.DEALER, zmq.REQ, zmq.DEALER):
            stranger = stack.enter_context(raw(kind))
            stranger.connect(endpoint(listener))
            stranger.send(b"GET / HTTP/1.1")
        for _ in range(10):
            stranger.send_multipart([write_header(Message(Kind.DATA, 0)), b"bytes for somebody else"])
        stranger.send_multipart([b""] * 50)
        stranger.send(b"x" * (2 * CHUNK))  # too large: ZeroMQ hangs up
        tcp = stack.enter_context(socket.create_connection(("127.0.0.1", int(endpoint(listener).rpartition(":")[2]))))
        tcp.sendall(b"SSH-2.0-nonsense\r\n" * 10)
        out.send(b"undisturbed")
        expect(into, b"undisturbed")
        for channel in (*pair(listener, interrupt), out, into):
            channel.close()


def test_an_older_dialler_is_told(listener: Listener) -> None:
    with raw(zmq.DEALER) as older:
        older.connect(endpoint(listener))
        older.send_multipart([write_header(greeting(Kind.HELLO)), b"migfw-zmq\x07"])
        header, text = older.recv_multipart()
        assert header[0] == Kind.REFUSE and text == b"version 7 of the protocol, expected 1"


def test_a_peer_that_floods_is_cut_off(listener: Listener, interrupt: Interrupt) -> None:
    with raw(zmq.DEALER) as hostile:
        hostile.connect(endpoint(listener))
        hello = greeting(Kind.HELLO)
        hostile.send_multipart([write_header(hello), bytes(hello.payload)])
        with listener.accept(interrupt) as channel:
            assert hostile.recv_multipart()[0][0] == Kind.WELCOME
            for offset in range(0, 2 * WINDOW, CHUNK):
                hostile.send_multipart([write_header(Message(Kind.DATA, offset)), bytes(CHUNK)])
            kinds = [hostile.recv_multipart()[0][0]]
            while kinds[-1] == Kind.PING:
                kinds.append(hostile.recv_multipart()[0][0])
            assert kinds[-1] == Kind.RESET
            with pytest.raises(ChannelError, match="DATA beyond the window"):
                channel.send(b"x")


def answers(kind: int, *reply: bytes) -> str:
    """The error of a dialler if the listener answers with this."""
    with raw(kind) as other:
        port = other.bind_to_random_port("tcp://127.0.0.1")
        interrupt = Interrupt()
        dialling = Task("connect", zmq_transport(f"zmq:tcp://127.0.0.1:{port}").connect, interrupt)
        if kind == zmq.ROUTER:
            identity = other.recv_multipart()[0]
            other.send_multipart([identity, *reply])
        error = dialling.error()
        interrupt.close()
    assert type(error) is ChannelError
    return str(error)


def test_listeners_that_are_something_else() -> None:
    assert "does not speak migfw's protocol" in answers(zmq.ROUTER, b"hello")
    assert "speaks a different version" in answers(zmq.ROUTER, write_header(greeting(Kind.WELCOME)), b"migfw-zmq\x02")
    assert "the listener refuses: no" in answers(zmq.ROUTER, write_header(Message(Kind.REFUSE)), b"no")
    assert "the handshake failed" in answers(zmq.PUB)


def test_a_listener_that_never_answers(interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"zmq:tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ChannelError, match=f"{uri}: no answer within 0 s"):
            zmq_transport(uri).connect(interrupt)
        interrupt.set()
        with pytest.raises(Interrupted):
            zmq_transport(uri).connect(interrupt)
