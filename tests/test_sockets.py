"""Sockets, dialing and listening: behaviour that only sockets have, and the contract kit does not check."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corefw.channel import Interrupt, receive_exactly
from corefw.errors import ChannelError, Interrupted, UriError
from corefw.net import dialing
from corefw.net.dialing import check_unix_path, connect_tcp, connect_unix, listen_tcp, listen_unix
from corefw.net.sockets import SocketChannel
from corefw.testing.tasks import Possessions, Task, wait_until
from corefw.uri import MigrationUri, split_host_port

NEVER = Interrupt()
"""An interrupt that is never set."""


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    before = Possessions.now()
    yield
    before.assert_no_more()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose paths are short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="mt", dir="/tmp"))
    yield made
    shutil.rmtree(made)


def tcp(text: str) -> tuple[str, int, MigrationUri]:
    """Arguments for connect_tcp and listen_tcp."""
    return *split_host_port(text, text), MigrationUri("tcp", text)


def unix(path: Path | str) -> tuple[str, MigrationUri]:
    return str(path), MigrationUri("unix", str(path))


def pair() -> tuple[SocketChannel, SocketChannel]:
    with listen_tcp(*tcp("127.0.0.1:0")) as listener:
        return connect_tcp(*tcp(listener.uri.rest), NEVER), listener.accept(NEVER)


# -- tcp -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listens", "dials"),
    [
        ("127.0.0.1:0", ("127.0.0.1",)),
        ("[::1]:0", ("[::1]",)),
        ("localhost:0", ("localhost", "127.0.0.1")),
        (":0", ("127.0.0.1", "[::1]", "localhost", "")),
        ("[::]:0", ("127.0.0.1", "[::1]")),
        ("0.0.0.0:0", ("127.0.0.1", "127.0.0.7", "0.0.0.0")),
    ],
)
def test_every_form_of_host(listens: str, dials: tuple[str, ...]) -> None:
    if "[" in listens + "".join(dials) and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    with listen_tcp(*tcp(listens)) as listener:
        host, _, port = listener.uri.rest.rpartition(":")
        assert host == listens.rpartition(":")[0]
        assert int(port) > 0
        for one in dials:
            with connect_tcp(*tcp(f"{one}:{port}"), NEVER) as out, listener.accept(NEVER) as into:
                out.send(b"x")
                receive_exactly(into, memoryview(bytearray(1)))
                assert out.peer == f"tcp:{one}:{port}"
                assert into.peer.startswith(("tcp:127.0.0.", "tcp:[::1]:"))
                assert "ffff" not in into.peer


def test_a_name_with_several_addresses_is_tried_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen_tcp(*tcp("127.0.0.3:0")) as listener:
        port = int(listener.uri.rest.rpartition(":")[2])
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", port)) for n in (1, 2, 3)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with connect_tcp("three", port, MigrationUri("tcp", "three"), NEVER), listener.accept(NEVER):
            pass
    with pytest.raises(ChannelError, match=r"^tcp:three: connection refused \(is the destination listening\?\)$"):
        connect_tcp("three", port, MigrationUri("tcp", "three"), NEVER)


def test_a_listener_takes_every_address_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", 0)) for n in (1, 2)]
    found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)))  # not this host's
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listen_tcp("two", 0, MigrationUri("tcp", "two:0")) as listener:
        names = [sock.getsockname() for sock in listener.sockets]
    port = int(listener.uri.rest.removeprefix("two:"))
    assert names == [("127.0.0.1", port), ("127.0.0.2", port)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[2:])
    with pytest.raises(ChannelError, match="tcp:two:0: this host does not have that address"):
        listen_tcp("two", 0, MigrationUri("tcp", "two:0"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", r"tcp:127.0.0.1:1: connection refused \(is the destination listening\?\)"),
        ("127.0.0.1:0", "port 0 cannot be dialled"),
        ("no-such-host.invalid:4444", "cannot find the host 'no-such-host.invalid': "),
        ("a..b:4444", "cannot find the host 'a..b': "),
        ("a\0b:4444", "cannot find the host"),
    ],
)
def test_dialling_fails_with_the_cause(address: str, expected: str) -> None:
    with pytest.raises(ChannelError, match=expected):
        connect_tcp(*tcp(address), NEVER)


def test_an_interrupt_ends_name_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def slow(*_: object, **options: int) -> list[object]:
        if options.get("flags") == socket.AI_NUMERICHOST:
            raise socket.gaierror
        answer.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    interrupt = Interrupt()
    dialling = Task("dial", connect_tcp, *tcp("slow:1"), interrupt)
    dialling.let_block()
    interrupt.set()
    assert isinstance(dialling.error(), Interrupted)
    answer.set()
    interrupt.close()


def test_options_of_a_connection() -> None:
    out, into = pair()
    for channel in (out, into):
        sock = channel._socket
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        # Connections within a host are not paced, whatever the host's default is.
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
        assert not sock.get_inheritable()
        channel.close()


def test_a_reset_that_the_sender_saw_is_no_end_for_the_receiver() -> None:
    """The kernel reports a reset once, and an end of the stream afterwards."""
    out, into = pair()
    into.abort()
    into.close()
    with pytest.raises(ChannelError):
        while True:
            out.send(bytes(1 << 16))
    for _ in range(2):
        with pytest.raises(ChannelError, match=r"^tcp:127\.0\.0\.1:\d+: the peer (reset|closed) the connection$"):
            out.receive_into(memoryview(bytearray(1)))
    out.close()


def test_a_reset_that_nobody_was_told_of_yet_is_no_end_either() -> None:
    """The sending thread has taken the error from the kernel, but has not stored it yet."""
    out, into = pair()
    into.abort()
    into.close()
    assert wait_until(lambda: bool(out._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)))  # takes it
    assert out._socket.recv(1) == b""
    with pytest.raises(ChannelError, match="the peer reset the connection"):
        out.receive_into(memoryview(bytearray(1)))
    out.close()


def test_both_threads_learn_that_the_peer_did_not_answer() -> None:
    """The kernel tells only one of them that the limit on silence ended the connection."""

    def send_for_ever(out: SocketChannel) -> None:
        """To a peer that reads nothing."""
        while True:
            out.send(bytes(1 << 20))

    pairs = [pair() for _ in range(12)]
    tasks: list[Task[object]] = []
    for out, _ in pairs:
        out.limit_silence(1)
        tasks.append(Task("receiving", out.receive_into, memoryview(bytearray(1))))
        tasks.append(Task("sending", send_for_ever, out))
    for task in tasks:
        with pytest.raises(ChannelError, match="no answer from the peer"):
            task.result()
    for one in itertools.chain(*pairs):
        one.close()


def test_memory_that_is_not_to_be_had_does_not_end_the_connection() -> None:
    """The destination has to report the error; otherwise the guest would stay stopped on the source."""
    out, into = pair()
    with out, into:
        out.send(b"word")
        with pytest.raises(ChannelError, match="out of memory"):
            into.receive_memory(np.array([[4096, 4]], dtype=np.uint64))
        into.send(b"SHUT 1")
        heard = memoryview(bytearray(6))
        receive_exactly(out, heard)
        assert bytes(heard) == b"SHUT 1"


def test_an_error_of_a_function_that_has_the_socket_is_the_channels() -> None:
    out, into = pair()
    with out, into:

        def fail(_descriptor: int) -> int:
            raise ConnectionResetError(errno.ECONNRESET, "reset")

        with pytest.raises(ChannelError, match="the peer reset the connection"):
            into.receive_from_socket(fail)
        with pytest.raises(ChannelError, match="the peer reset the connection"):
            out.send_to_socket(fail)
        into.abort()
        out.abort()
        with pytest.raises(Interrupted):
            into.receive_from_socket(fail)
        with pytest.raises(Interrupted):
            out.send_to_socket(fail)


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_abort_ends_a_long_send_to_a_slow_reader(family: str) -> None:
    """It is one call, but it waits for each of its messages separately."""
    if family == "tcp":
        out, into = pair()
    else:
        out, into = (SocketChannel(sock, family) for sock in socket.socketpair())
    data = np.ones((8192, 4096), dtype=np.uint8)
    pieces = np.empty((len(data), 2), dtype=np.uint64)
    pieces[:, 0], pieces[:, 1] = data.ctypes.data + 4096 * np.arange(len(data)), 4096
    with out, into:
        sending = Task("sending", out.send_memory, pieces)
        _read_slowly(into)
        out.abort()
        _read_slowly(into)
        with pytest.raises(Interrupted):
            sending.result()


def _read_slowly(channel: SocketChannel) -> None:
    for _ in range(5):
        time.sleep(0.02)
        if channel.wait_readable(0):  # nothing more comes when the sender has ended
            channel.receive_into(memoryview(bytearray(1 << 16)))


def test_an_end_on_both_sides_is_no_reset() -> None:
    out, into = pair()
    for first, second in ((out, into), (into, out)):
        first.send_eof()
        assert second.receive_into(memoryview(bytearray(1))) == 0
    for channel in (out, into):
        assert channel.receive_into(memoryview(bytearray(1))) == 0
        channel.close()


def test_closing_over_unread_bytes_loses_nothing() -> None:
    """A plain close would make the kernel send a reset and drop what is on its way."""
    out, into = pair()
    into.send(b"never read")
    assert out.wait_readable(10)
    data = os.urandom(6 << 20)

    def send_and_close() -> None:
        out.send(data)
        out.close()

    sending = Task("send and close", send_and_close)
    room = memoryview(bytearray(len(data)))
    receive_exactly(into, room)
    assert room == data
    sending.result()
    assert into.receive_into(room) == 0
    into.close()


def test_close_lingers_in_the_background_while_a_slow_peer_sends() -> None:
    out, into = pair()
    chunk, sent = os.urandom(1 << 16), 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += out._socket.send(chunk[sent % len(chunk) :], socket.MSG_DONTWAIT)
    out.close()
    assert any(thread.name == "migfw-linger" for thread in threading.enumerate())
    into.send(b"this would reset the connection")
    room, got = memoryview(bytearray(len(chunk))), 0
    while count := into.receive_into(room[: len(chunk) - got % len(chunk)]):
        assert room[:count] == chunk[got % len(chunk) :][:count]
        got += count
    assert got == sent
    into.close()


def test_close_wakes_a_receiver_of_the_same_channel() -> None:
    for out, into in (pair(), reversed(pair())):
        blocked = Task("receive", into.receive_into, memoryview(bytearray(1)))
        blocked.let_block()
        into.close()
        assert isinstance(blocked.error(), Interrupted)
        out.close()


def test_an_aborted_connection_is_reset() -> None:
    out, into = pair()
    out.send(b"x")
    out.abort()
    out.close()
    with pytest.raises(ChannelError, match="the peer reset the connection"):
        while into.receive_into(memoryview(bytearray(10))):
            pass
    into.close()


def test_a_peer_that_has_gone_before_it_is_accepted_does_no_harm() -> None:
    with listen_tcp(*tcp("127.0.0.1:0")) as listener:
        address = split_host_port(listener.uri.rest, "")
        with socket.create_connection(address) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with listener.accept(NEVER) as first, pytest.raises(ChannelError, match="the peer reset the connection"):
            first.receive_into(memoryview(bytearray(1)))
        with connect_tcp(*address, listener.uri, NEVER), listener.accept(NEVER):
            pass


def test_what_was_taken_whole_is_sent_whatever_another_thread_hears() -> None:
    """A peer that has everything may close at once, and the receiving thread may notice before the send returns."""
    here, peer = socket.socketpair()

    class Slow(socket.socket):
        def sendmsg(self, *arguments: Any) -> int:
            count = super().sendmsg(*arguments)
            peer.close()  # over unread bytes: a reset
            with pytest.raises(ChannelError):
                channel.receive_into(memoryview(bytearray(1)))
            return count

    with SocketChannel(Slow(fileno=here.detach()), "peer") as channel:
        channel.send(b"all of it")
        with pytest.raises(ChannelError):
            channel.send(b"more")


def test_close_ends_an_accept_that_waits() -> None:
    listener = listen_tcp(*tcp("127.0.0.1:0"))
    waiting = Task("accept", listener.accept, NEVER)
    waiting.let_block()
    listener.close()
    for error in (waiting.error(), Task("accept again", listener.accept, NEVER).error()):
        assert isinstance(error, ChannelError)
        assert str(error) == f"{listener.uri}: is no longer listening"


# -- unix ----------------------------------------------------------------------------------------------------------


def test_the_socket_file_is_private_and_goes_with_the_listener(folder: Path) -> None:
    path = folder / "s"
    before = os.umask(0)
    try:
        listener = listen_unix(*unix(path))
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert path.stat().st_mode & 0o777 == 0o600
    listener.close()
    assert not path.exists()
    listener.close()


def test_the_socket_file_appears_when_it_listens_already(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits for the file can dial at once, and no other listener takes it for a stale one."""
    path = folder / "s"

    class Watched(socket.socket):
        def listen(self, backlog: int = 0, /) -> None:
            assert not path.exists(), "nobody answers there yet"
            super().listen(backlog)
            seen.append(path)

    seen: list[Path] = []
    monkeypatch.setattr(socket, "socket", Watched)
    with listen_unix(*unix(path)), connect_unix(*unix(path), NEVER):
        assert seen == [path]
        assert list(folder.iterdir()) == [path]


def test_a_folder_with_a_long_path(folder: Path) -> None:
    long = folder / ("f" * (104 - len(os.fsencode(folder))))
    long.mkdir()
    with listen_unix(*unix(long / "s")), connect_unix(*unix(long / "s"), NEVER):
        pass
    assert not any(long.iterdir())


def test_a_stale_socket_is_replaced(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with (
        listen_unix(*unix(path)) as listener,
        connect_unix(*unix(path), NEVER) as out,
        listener.accept(NEVER) as into,
    ):
        assert out.peer == into.peer == f"unix:{path}"
    assert not path.exists()


def test_a_live_socket_and_a_file_are_not(folder: Path) -> None:
    with listen_unix(*unix(folder / "s")) as listener:
        with pytest.raises(ChannelError, match=f"unix:{folder}/s: the address is in use"):
            listen_unix(*unix(folder / "s"))
        with pytest.raises(BlockingIOError):  # no connection: a destination would take the first one for its source
            listener.sockets[0].accept()
    (folder / "file").write_text("precious")
    with pytest.raises(ChannelError, match="it exists and is not a stale socket of yours"):
        listen_unix(*unix(folder / "file"))
    assert (folder / "file").read_text() == "precious"
    with pytest.raises(ChannelError, match=f"unix:{folder}/none/s: no such file or directory"):
        listen_unix(*unix(folder / "none" / "s"))


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_will_do(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with listen_unix(*unix(path)) as listener:
        with connect_unix(*unix(path), NEVER), listener.accept(NEVER):
            pass
        with pytest.raises(ChannelError, match=f"unix:{path}: the address is in use"):
            listen_unix(*unix(path))
        assert [file.name for file in folder.iterdir()] == ["s"]
    assert not any(folder.iterdir())


def test_a_socket_that_another_has_put_there_stays(folder: Path) -> None:
    path = folder / "s"
    with listen_unix(*unix(path)):
        path.unlink()
        other = listen_unix(*unix(path))
    assert path.exists()
    other.close()


def test_the_socket_file_is_removed_from_another_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with listen_unix(*unix("relative")):
        monkeypatch.chdir("/")
    assert not any(folder.iterdir())


def test_abstract_names_leave_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    name = f"@{folder.name}"
    with listen_unix(*unix(name)) as listener:
        with connect_unix(*unix(name), NEVER), listener.accept(NEVER):
            pass
        with pytest.raises(ChannelError, match=f"unix:{name}: the address is in use"):
            listen_unix(*unix(name))
    assert not any(folder.iterdir())
    with pytest.raises(ChannelError, match="connection refused"):
        connect_unix(*unix(name), NEVER)


@pytest.mark.parametrize("name", ["p" * 107, "@" + "n" * 107])
def test_the_longest_names_work(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    check_unix_path(*unix(name))
    with listen_unix(*unix(name)) as listener, connect_unix(*unix(name), NEVER), listener.accept(NEVER):
        pass


@pytest.mark.parametrize("name", ["p" * 108, "ä" * 54, "@" + "n" * 108, "@", "a\0b"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UriError):
        check_unix_path(*unix(name))


def test_a_full_backlog_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "BACKLOG", 0)
    with listen_unix(*unix(folder / "s")) as listener:
        first = connect_unix(*unix(folder / "s"), NEVER)
        dialling = Task("dial", connect_unix, *unix(folder / "s"), NEVER)
        dialling.let_block()
        assert dialling.running
        for channel in (first, listener.accept(NEVER), dialling.result(), listener.accept(NEVER)):
            channel.close()
