"""Logging in to a real sshd: keys, agent, aliases, host keys, proxies."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from corefw_transport_ssh import SshTransport

from corefw.channel import Interrupt, TransportContext, receive_exactly
from corefw.errors import ChannelError
from corefw.net.dialing import listen_tcp
from corefw.net.sockets import SocketListener
from corefw.uri import MigrationUri
from tests.helpers.sshd import Sshd, make_key, running_agent, running_sshd

pytestmark = pytest.mark.sshd


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    made = Interrupt()
    yield made
    made.close()


@pytest.fixture
def listener() -> Iterator[SocketListener]:
    with listen_tcp("127.0.0.1", 0, MigrationUri.parse("tcp:127.0.0.1:0")) as listening:
        assert isinstance(listening, SocketListener)
        yield listening


def reaches(host: str, listener: SocketListener, interrupt: Interrupt) -> None:
    """Send a word through the tunnel and another back. Raises what connect() raises."""
    transport = SshTransport(MigrationUri.parse(f"ssh://{host}/{listener.uri}"), TransportContext())
    with transport.connect(interrupt) as out, listener.accept(interrupt) as into:
        for sender, receiver in ((out, into), (into, out)):
            sender.send(b"word")
            room = bytearray(4)
            receive_exactly(receiver, memoryview(room))
            assert room == b"word"


def refusal(host: str, listener: SocketListener, interrupt: Interrupt) -> str:
    """The error of connect(): one line that names the URI."""
    with pytest.raises(ChannelError) as caught:
        reaches(host, listener, interrupt)
    text = str(caught.value)
    assert text.startswith(f"ssh://{host}/{listener.uri}: ") and "\n" not in text
    return text


# -- our keys ------------------------------------------------------------------------------------------------------


def test_a_key_file(sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    reaches(sshd.address, listener, interrupt)
    reaches(f"127.0.0.1:{sshd.port}", listener, interrupt)  # as the present user


def test_other_kinds_of_key(sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    authorized = sshd.folder / "authorized_keys"
    before = authorized.read_text()
    try:
        for kind in ("rsa", "ecdsa"):
            (home / ".ssh" / "id_ed25519").unlink(missing_ok=True)
            key = make_key(home / ".ssh" / f"id_{kind}", kind=kind)
            authorized.write_text(key.with_suffix(".pub").read_text())
            reaches(sshd.address, listener, interrupt)
            key.unlink()
    finally:
        authorized.write_text(before)


def test_the_agent(
    sshd: Sshd,
    home: Path,
    short_folder: Path,
    listener: SocketListener,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    strangers = [make_key(home / f"other{number}") for number in range(2)]
    with running_agent(short_folder, *strangers, sshd.client_key) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(address))
        reaches(sshd.address, listener, interrupt)
        (home / ".ssh" / "config").write_text("Host *\n IdentitiesOnly yes\n")
        assert "no key" in refusal(sshd.address, listener, interrupt)
        public = sshd.client_key.with_suffix(".pub").read_bytes()
        (home / ".ssh" / "id_ed25519.pub").write_bytes(public)
        reaches(sshd.address, listener, interrupt)
        (home / ".ssh" / "config").write_text("Host *\n IdentityAgent none\n")
        refusal(sshd.address, listener, interrupt)


def test_a_passphrase_asks_for_the_agent(
    sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt
) -> None:
    key = home / ".ssh" / "id_ed25519"
    command = ["ssh-keygen", "-q", "-p", "-N", "a passphrase", "-f", str(key)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    assert f"{key} has a passphrase (give it to ssh-agent: ssh-add {key})" in refusal(sshd.address, listener, interrupt)


def test_a_key_that_others_can_read(sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    (home / ".ssh" / "id_ed25519").chmod(0o644)
    assert "can be read by others (chmod 600" in refusal(sshd.address, listener, interrupt)


def test_nonsense_for_a_key(sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    (home / ".ssh" / "id_ed25519").write_text("nonsense\n")
    assert "is not a private key that can be used" in refusal(sshd.address, listener, interrupt)


def test_the_wrong_key(
    sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(home / "nobody"))
    key = home / ".ssh" / "id_ed25519"
    key.unlink()
    make_key(key)
    text = refusal(sshd.address, listener, interrupt)
    assert f"does not let '{sshd.user}' in; offered: {key}" in text
    assert f"ssh-agent at {home / 'nobody'}" in text


def test_too_many_keys(
    sshd: Sshd,
    home: Path,
    short_folder: Path,
    listener: SocketListener,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    strangers = [make_key(home / f"other{number}") for number in range(8)]
    with running_agent(short_folder, *strangers) as address:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(address))
        assert "too many keys (IdentitiesOnly?)" in refusal(sshd.address, listener, interrupt)


# -- their key -----------------------------------------------------------------------------------------------------


def test_an_unknown_host(sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    (home / ".ssh" / "known_hosts").unlink()
    text = refusal(sshd.address, listener, interrupt)
    assert f"the host key of '[127.0.0.1]:{sshd.port}' is not known: ssh-ed25519 SHA256:" in text
    command = text.rpartition("accept it with: ")[2]
    assert command == f"ssh-keyscan -p {sshd.port} 127.0.0.1 >> ~/.ssh/known_hosts"
    subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True)  # and that is all it takes
    reaches(sshd.address, listener, interrupt)


def test_a_changed_host(sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    kind, blob = make_key(home / "other").with_suffix(".pub").read_text().split()[:2]
    known = home / ".ssh" / "known_hosts"
    known.write_text(f"# a comment\n[127.0.0.1]:{sshd.port} {kind} {blob}\n")
    text = refusal(sshd.address, listener, interrupt)
    assert f"THE HOST KEY OF '[127.0.0.1]:{sshd.port}' HAS CHANGED" in text and f"{known}:2 has" in text
    command = text.rpartition("forget the old one with: ")[2]
    subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True)
    assert "is not known" in refusal(sshd.address, listener, interrupt)


def test_a_hashed_known_hosts(sshd: Sshd, home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    known = home / ".ssh" / "known_hosts"
    subprocess.run(["ssh-keygen", "-H", "-f", known], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    reaches(sshd.address, listener, interrupt)


# -- ~/.ssh/config -------------------------------------------------------------------------------------------------


@pytest.fixture
def alias(sshd: Sshd, home: Path) -> str:
    """The alias "far" for the sshd, with its key and known_hosts in other places."""
    (home / ".ssh" / "id_ed25519").rename(home / "key")
    (home / ".ssh" / "known_hosts").rename(home / "known")
    (home / ".ssh" / "config").write_text(
        f"Host far\n HostName 127.0.0.1\n Port {sshd.port}\n User {sshd.user}\n"
        f" IdentityFile ~/key\n UserKnownHostsFile ~/known\n"
    )
    return "far"


def test_an_alias(alias: str, listener: SocketListener, interrupt: Interrupt) -> None:
    reaches(alias, listener, interrupt)


def test_a_jump_host(
    sshd: Sshd, alias: str, home: Path, tmp_path: Path, listener: SocketListener, interrupt: Interrupt
) -> None:
    with running_sshd(tmp_path / "second") as second:
        with (home / "known").open("a") as known:
            known.write(second.known_hosts_line())
        (second.folder / "authorized_keys").write_bytes(sshd.client_key.with_suffix(".pub").read_bytes())
        with (home / ".ssh" / "config").open("a") as settings:
            settings.write(
                f"Host beyond\n HostName 127.0.0.1\n Port {second.port}\n ProxyJump far\n"
                f" IdentityFile ~/key\n UserKnownHostsFile ~/known\nHost circle\n ProxyJump circle\n"
            )
        reaches("beyond", listener, interrupt)
        assert sshd.log.read_text().count("Accepted publickey") and second.log.read_text().count("Accepted publickey")
    assert "in a circle" in refusal("circle", listener, interrupt)
    assert "cannot be reached from the jump host" in refusal("beyond", listener, interrupt)


def test_a_proxy_command(alias: str, home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    program = (
        "import socket,sys,threading as t,os\n"
        "s=socket.create_connection((sys.argv[1],sys.argv[2]))\n"
        "def up():\n"
        " while d:=os.read(0,65536): s.sendall(d)\n"
        "t.Thread(target=up,daemon=True).start()\n"
        "while d:=s.recv(65536): os.write(1,d)\n"
    )
    (home / "proxy.py").write_text(program)
    settings = home / ".ssh" / "config"
    before = settings.read_text()
    settings.write_text(before + f" ProxyCommand {sys.executable} {home}/proxy.py %h %p\n")
    reaches(alias, listener, interrupt)
    settings.write_text(before + " ProxyCommand exit 7\n")
    assert "ProxyCommand 'exit 7' does not answer like an sshd" in refusal(alias, listener, interrupt)


# -- no sshd at all ------------------------------------------------------------------------------------------------


def test_nobody_there(home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    assert "connection refused (is sshd running there?)" in refusal("127.0.0.1:1", listener, interrupt)
    assert "cannot find the host 'no-such-host.invalid'" in refusal("no-such-host.invalid", listener, interrupt)


def test_something_else_there(home: Path, listener: SocketListener, interrupt: Interrupt) -> None:
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(listen_tcp("127.0.0.1", 0, MigrationUri.parse("tcp:127.0.0.1:0")))
        assert isinstance(other, SocketListener)
        port = other.uri.rest.rpartition(":")[2]
        speaker = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import socket; s=socket.socket(fileno={other.sockets[0].fileno()}); s.setblocking(True);"
                "c=s.accept()[0]; c.sendall(b'220 mail ready\\r\\n'*200)",
            ],
            pass_fds=[other.sockets[0].fileno()],
        )
        stack.callback(speaker.wait)
        stack.callback(speaker.kill)
        assert "does not answer like an sshd" in refusal(f"127.0.0.1:{port}", listener, interrupt)
