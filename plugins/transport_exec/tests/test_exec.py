"""exec: commands, how they end, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from corefw_transport_exec import ExecTransport

from corefw.channel import Channel, Interrupt, Transport, TransportContext
from corefw.errors import ChannelError, Interrupted
from corefw.testing.tasks import Possessions, Task, wait_until
from corefw.uri import MigrationUri

NEVER = Interrupt()
"""An interrupt that is never set."""


def exec_(command: str) -> Transport:
    return ExecTransport(MigrationUri("exec", command), TransportContext())


def outgoing(command: str) -> Channel:
    return exec_(command).connect(NEVER)


def incoming(command: str) -> Channel:
    return exec_(command).listen().accept(NEVER)


def receive_all(channel: Channel) -> bytes:
    room, got = memoryview(bytearray(65536)), b""
    while count := channel.receive_into(room):
        got += room[:count]
    return got


def test_a_shell_runs_the_command(tmp_path: Path) -> None:
    with outgoing(f"gzip -c > {tmp_path}/a.gz && gzip -dc {tmp_path}/a.gz | tr a-z A-Z > {tmp_path}/b") as channel:
        channel.send(b"a guest")
        channel.send_eof()
        assert (tmp_path / "b").read_bytes() == b"A GUEST"  # send_eof waited for the command
    with incoming(f"gzip -dc {tmp_path}/a.gz") as channel:
        assert receive_all(channel) == b"a guest"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("cat > /dev/null; echo disk full >&2; exit 3", "the command exited with status 3: disk full"),
        ("cat > /dev/null; kill -9 $$", "the command was killed by SIGKILL"),
        ("no-such-program-here", "the command exited with status 127: /bin/sh: "),
        ("cat > /dev/null; echo; echo one >&2; echo /two/ >&2; exit 3", "exited with status 3: one / /two/$"),
    ],
)
def test_a_failed_command_fails_the_stream(command: str, expected: str) -> None:
    with outgoing(command) as channel, pytest.raises(ChannelError, match=expected) as caught:
        channel.send(bytes(1 << 20))
        channel.send(bytes(1 << 20))
        channel.send_eof()
    assert str(caught.value).startswith(f"exec:{command}: ")
    assert "\n" not in str(caught.value)


def test_a_failed_source_is_no_end() -> None:
    with incoming("printf half; echo the tape broke >&2; exit 1") as channel:
        room = memoryview(bytearray(100))
        assert channel.receive_into(room) == 4
        for _ in range(2):
            with pytest.raises(ChannelError, match=r"exited with status 1: the tape broke"):
                channel.receive_into(room)


def test_a_command_that_does_not_read_fails() -> None:
    with outgoing("exec <&-; exit 0") as channel, pytest.raises(ChannelError, match="no longer reads its input"):
        for _ in range(100):
            channel.send(bytes(1 << 20))


def test_long_complaints_are_cut() -> None:
    with outgoing("cat > /dev/null; seq 1000000 >&2; echo the last line >&2; exit 1") as channel:
        with pytest.raises(ChannelError, match="the last line") as caught:
            channel.send_eof()
        assert len(str(caught.value)) < 3000


def test_abort_kills_the_whole_group(tmp_path: Path) -> None:
    before = Possessions.now()
    channel = outgoing(f"(sleep 1000 & echo $! > {tmp_path}/child; wait)")
    assert wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
    child = int((tmp_path / "child").read_text())
    ending = Task("send_eof", channel.send_eof)
    ending.let_block()
    channel.abort()
    with pytest.raises(Interrupted):
        ending.result()
    channel.close()
    assert wait_until(lambda: not alive(child))
    before.assert_no_more()


def test_close_before_the_end_leaves_no_process(tmp_path: Path) -> None:
    before = Possessions.now()
    with incoming(f"echo $$ > {tmp_path}/pid; yes") as channel:
        channel.receive_into(memoryview(bytearray(10)))
    with outgoing("cat > /dev/null") as channel:
        channel.send(b"and no end")
    before.assert_no_more()
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_background_process_does_not_hold_the_end(tmp_path: Path) -> None:
    """The command has exited, but its child keeps the pipe of the standard error open."""
    child = tmp_path / "child"
    try:
        with outgoing(f"cat > /dev/null; sleep 1000 & echo $! > {child}") as channel:
            channel.send(b"x")
            Task("send_eof", channel.send_eof).result()
            assert alive(int(child.read_text()))
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(child.read_text()), signal.SIGKILL)


def test_it_gives_one_stream() -> None:
    with exec_("printf x").listen() as listener:
        listener.accept(NEVER).close()
        with pytest.raises(ChannelError, match="already in use"):
            listener.accept(NEVER)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
