"""Failures on the way or at the far end are reported in one line; they never look like an end, and never hang."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from corefw_transport_ssh import SshTransport
from corefw_transport_ssh.channel import SshChannel
from corefw_transport_ssh.connection import Connection
from paramiko.packet import Packetizer

from corefw.channel import Channel, Interrupt, Listener, TransportContext, receive_exactly
from corefw.errors import ChannelError, Interrupted
from corefw.net.dialing import listen_tcp
from corefw.testing.ends import pattern, receive_all
from corefw.testing.tasks import Task, wait_until
from corefw.uri import MigrationUri
from tests.helpers.sshd import Sshd, running_sshd

pytestmark = pytest.mark.sshd

MIB = 1 << 20


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    made = Interrupt()
    yield made
    made.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listen_tcp("127.0.0.1", 0, MigrationUri.parse("tcp:127.0.0.1:0")) as listening:
        yield listening


def ssh(sshd: Sshd, target: object) -> SshTransport:
    return SshTransport(MigrationUri.parse(f"ssh://{sshd.address}/{target}"), TransportContext())


def pair(sshd: Sshd, listener: Listener, interrupt: Interrupt) -> tuple[Channel, Channel]:
    target = str(listener.uri).rpartition("tcp:")[2]
    return ssh(sshd, f"tcp:{target}").connect(interrupt), listener.accept(interrupt)


# -- a connection that breaks ----------------------------------------------------------------------------------------


def test_a_lost_connection_is_no_end(sshd: Sshd, home: Path, listener: Listener, interrupt: Interrupt) -> None:
    out, into = pair(sshd, listener, interrupt)
    with out, into:
        into.send(b"half of")
        receive_exactly(out, memoryview(bytearray(7)))
        waiting = Task("receiving", out.receive_into, memoryview(bytearray(8)))
        waiting.let_block()
        sshd.kill_sessions()
        error = waiting.error()
        assert type(error) is ChannelError and "the ssh connection was lost" in str(error)
        for call in (lambda: out.receive_into(memoryview(bytearray(8))), lambda: out.send(b"x"), out.send_eof):
            with pytest.raises(ChannelError, match="the ssh connection was lost"):
                call()


def test_a_lost_connection_stops_the_sender(sshd: Sshd, home: Path, listener: Listener, interrupt: Interrupt) -> None:
    out, into = pair(sshd, listener, interrupt)
    with out, into:
        sending = Task("sending", lambda: [out.send(pattern(MIB)) for _ in range(1000)])
        sending.let_block(0.2)
        sshd.kill_sessions()
        error = sending.error()
        assert type(error) is ChannelError and "the ssh connection was lost" in str(error)


def test_an_end_is_not_sent_over_a_lost_connection(
    sshd: Sshd, home: Path, listener: Listener, interrupt: Interrupt
) -> None:
    """Not even before the loss was noticed."""
    out, into = pair(sshd, listener, interrupt)
    with out, into:
        out.send(b"half of")
        sshd.kill_sessions()
        assert wait_until(lambda: not cast(SshChannel, out)._connection.is_active())
        with pytest.raises(ChannelError, match="the ssh connection was lost"):
            out.send_eof()


def test_an_end_is_refused_where_not_all_could_be_handed_on(
    sshd: Sshd, home: Path, short_folder: Path, interrupt: Interrupt
) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short_folder}/s")
        server.listen()
        with ssh(sshd, f"unix:{short_folder}/s").connect(interrupt) as out:
            with server.accept()[0]:
                out.send(
                    pattern(MIB)
                )  # more than a UNIX socket holds: the sshd keeps the rest, and cannot get rid of it
            assert wait_until(lambda: cast(SshChannel, out)._channel.closed)
            with pytest.raises(ChannelError, match="the peer closed the connection"):
                out.send_eof()


def test_an_end_before_the_loss_stays_an_end(sshd: Sshd, home: Path, listener: Listener, interrupt: Interrupt) -> None:
    out, into = pair(sshd, listener, interrupt)
    with out, into:
        into.send(b"all of it")
        into.send_eof()
        assert out.wait_readable(10)
        assert receive_all(out) == b"all of it"
        sshd.kill_sessions()
        assert wait_until(lambda: not sshd.sessions())
        assert out.receive_into(memoryview(bytearray(8))) == 0


def test_a_listener_whose_connection_is_lost(sshd: Sshd, home: Path, interrupt: Interrupt) -> None:
    with ssh(sshd, "tcp:127.0.0.1:0").listen() as listening:
        waiting = Task("accept", listening.accept, interrupt)
        waiting.let_block()
        sshd.kill_sessions()
        assert "the ssh connection was lost" in str(waiting.error())
        with pytest.raises(ChannelError, match="the ssh connection was lost"):
            listening.accept(interrupt)


def test_nothing_of_it_is_printed(
    sshd: Sshd, home: Path, interrupt: Interrupt, listener: Listener, capfd: pytest.CaptureFixture[str]
) -> None:
    out, into = pair(sshd, listener, interrupt)
    sshd.kill_sessions()
    with pytest.raises(ChannelError):
        receive_all(out)
    with pytest.raises(ChannelError):
        ssh(sshd, "tcp:127.0.0.1:1").connect(interrupt)
    out.close()
    into.close()
    assert capfd.readouterr() == ("", "")


def test_paramiko_s_own_words_are_for_debugging(
    sshd: Sshd, home: Path, interrupt: Interrupt, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="corefw_transport_ssh")
    with pytest.raises(ChannelError):
        ssh(sshd, "tcp:127.0.0.1:1").connect(interrupt)
    assert caplog.records and {record.levelno for record in caplog.records} == {logging.DEBUG}


# -- tunnels that do not come about ----------------------------------------------------------------------------------


REFUSALS = {
    "tcp:127.0.0.1:1": "cannot connect to tcp:127.0.0.1:1 (is the destination listening there?)",
    "tcp:no-such-host.invalid:80": "cannot connect to tcp:no-such-host.invalid:80",
    "unix:/nowhere/at/all": "cannot connect to unix:/nowhere/at/all: nothing listens there, or it does not allow",
    "tcp:127.0.0.1:0": "port 0 cannot be dialled",
}


@pytest.mark.parametrize("target", REFUSALS)
def test_dead_listeners(sshd: Sshd, home: Path, interrupt: Interrupt, target: str) -> None:
    with pytest.raises(ChannelError) as caught:
        ssh(sshd, target).connect(interrupt)
    assert REFUSALS[target] in str(caught.value)


def test_an_sshd_that_allows_nothing(tmp_path: Path, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_sshd(tmp_path / "strict", "AllowTcpForwarding no", "AllowStreamLocalForwarding no") as sshd:
        monkeypatch.setenv("HOME", str(sshd.make_home(tmp_path / "home")))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        with pytest.raises(ChannelError, match=r"does not allow a tunnel to tcp:127.0.0.1:1 \(AllowTcpForwarding"):
            ssh(sshd, "tcp:127.0.0.1:1").connect(interrupt)
        with pytest.raises(ChannelError, match="AllowStreamLocalForwarding"):
            ssh(sshd, "unix:/run/a").connect(interrupt)
        with pytest.raises(ChannelError, match=r"does not listen at tcp:127\.0\.0\.1:0 for us"):
            ssh(sshd, "tcp:127.0.0.1:0").listen()
        assert wait_until(lambda: not sshd.sessions())


# -- connections that several share -----------------------------------------------------------------------------------


def test_an_aborted_channel_leaves_the_others(sshd: Sshd, home: Path, interrupt: Interrupt) -> None:
    with ssh(sshd, "tcp:127.0.0.1:0").listen() as listening:
        pairs = [pair(sshd, listening, interrupt) for _ in range(2)]
        (first, aborted), (second, other) = pairs
        sending = Task("sending", lambda: [aborted.send(pattern(MIB)) for _ in range(100)])
        sending.let_block(0.3)
        aborted.abort()
        assert isinstance(sending.error(), Interrupted)
        aborted.close()
        receive_all(first)  # what was on its way still comes: ssh knows no reset
        with pytest.raises(ChannelError):
            while True:
                first.send(pattern(MIB))
        other.send(b"still here")
        receive_exactly(second, memoryview(bytearray(10)))
        third, last = pair(sshd, listening, interrupt)
        for channel in (first, second, other, third, last):
            channel.close()


def test_a_flood_of_peers_is_turned_away(sshd: Sshd, home: Path, interrupt: Interrupt) -> None:
    with ssh(sshd, "tcp:127.0.0.1:0").listen() as listening:
        target = "tcp:" + str(listening.uri).rpartition("tcp:")[2]
        peers = [connection for _ in range(40) for connection in [_tcp(target, interrupt)]]
        refused = [Task("receiving", peer.receive_into, memoryview(bytearray(1))) for peer in peers]
        assert wait_until(lambda: sum(not task.running for task in refused) >= 20)
        for peer in peers:
            peer.close()
    assert wait_until(lambda: not sshd.sessions())


def _tcp(target: str, interrupt: Interrupt) -> Channel:
    from corefw_transport_tcp import TcpTransport

    return TcpTransport(MigrationUri.parse(target), TransportContext()).connect(interrupt)


# -- keys that change in the midst of it -------------------------------------------------------------------------------


class Restless(Packetizer):
    """Renegotiates keys all the time."""

    REKEY_BYTES = MIB


def sends_there(out: Channel, into: Channel) -> tuple[Channel, Channel]:
    return out, into


def sends_back(out: Channel, into: Channel) -> tuple[Channel, Channel]:
    return into, out


@pytest.mark.parametrize("way", [sends_there, sends_back])
def test_keys_change_while_streams_begin_and_end(
    way: Callable[[Channel, Channel], tuple[Channel, Channel]],
    sshd: Sshd,
    home: Path,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a CLOSE arrives during a key exchange, paramiko itself deadlocks; ours must not."""
    monkeypatch.setattr(Connection, "packetizer_class", Restless)
    data = pattern(MIB + 7)
    with ssh(sshd, "tcp:127.0.0.1:0").listen() as listening:
        for _ in range(12):
            sender, receiver = way(*pair(sshd, listening, interrupt))
            with sender, receiver:
                sending = Task("sending", lambda channel: (channel.send(data), channel.send_eof()), sender)
                assert Task("receiving", receive_all, receiver).result() == data
                sending.result()
