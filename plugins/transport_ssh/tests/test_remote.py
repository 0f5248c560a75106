"""Commands on the remote host, over a real sshd."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from corefw_transport_ssh import remote

from corefw.channel import Interrupt, RemoteHost
from corefw.errors import ChannelError, UriError
from corefw.plugins import Plugins
from tests.helpers.sshd import Sshd

SECONDS = 30.0


@pytest.fixture
def host(sshd: Sshd, home: Path) -> Iterator[RemoteHost]:
    transport = Plugins().transport(f"ssh://{sshd.address}/tcp:localhost:0")
    with transport.log_in(Interrupt()) as logged_in:
        yield logged_in


def test_output_errors_and_status(host: RemoteHost) -> None:
    done = host.run(["sh", "-c", "echo out; echo err >&2; exit 3"], SECONDS)
    assert (done.status, done.output, done.errors) == (3, "out\n", "err\n")


def test_words_arrive_as_they_are(host: RemoteHost) -> None:
    words = ["a b", "$HOME", "'", '"', "*", "", "\\", "; false"]
    assert host.run(["printf", "%s\\n", *words], SECONDS).output.splitlines() == words


def test_a_command_that_is_not_there(host: RemoteHost) -> None:
    assert host.run(["/nowhere/program"], SECONDS).status == 127


def test_several_commands_one_after_the_other(host: RemoteHost) -> None:
    assert [host.run(["echo", str(number)], SECONDS).output for number in range(3)] == ["0\n", "1\n", "2\n"]


def test_stdin_ends_when_nobody_waits_any_more(host: RemoteHost, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    with pytest.raises(ChannelError, match="did not end in time"):
        host.run(["sh", "-c", f"cat; touch {seen}"], 0.5)
    deadline = time.monotonic() + SECONDS
    while not seen.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_output_is_bounded(host: RemoteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OUTPUT_LIMIT", 100_000)
    with pytest.raises(ChannelError, match="printed more than"):
        host.run(["sh", "-c", "yes"], SECONDS)


def test_a_lost_connection_is_an_error(host: RemoteHost, sshd: Sshd) -> None:
    host.run(["true"], SECONDS)
    sshd.kill_sessions()
    with pytest.raises(ChannelError):
        host.run(["sleep", "10"], SECONDS)


def test_other_transports_say_that_they_cannot() -> None:
    with pytest.raises(UriError, match="'tcp:' cannot run commands on the other host"):
        Plugins().transport("tcp:127.0.0.1:1").log_in(Interrupt())
