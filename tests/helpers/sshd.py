"""A real sshd for tests, run by the current user on a loopback port, with keys and settings in a temporary folder.

    with running_sshd(folder) as sshd:
        home = sshd.make_home(folder / "home")      # for HOME: an authorized key, and a known_hosts
        ... f"ssh://{sshd.user}@127.0.0.1:{sshd.port}/tcp:127.0.0.1:4444" ...

It works for root and for an ordinary user. Nothing outside the folder changes (root's sshd wants /run/sshd to exist).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

PRIVILEGE_SEPARATION: Final = Path("/run/sshd")
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 5.0
ATTEMPTS: Final = 5
NO_LOGIN: Final = frozenset({"nologin", "false"})
"""Shells of accounts that cannot log in."""


def find_sshd() -> str | None:
    """The absolute path of sshd, which refuses to start with a relative one, or None."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def missing_programs() -> list[str]:
    """Names of programs that these tests need and that are missing, for pytest.mark.skipif."""
    missing = [name for name in ("ssh-keygen", "ssh-agent", "ssh-add") if shutil.which(name) is None]
    if not find_sshd():
        missing.append("sshd")
    try:
        me = pwd.getpwuid(os.getuid())
    except KeyError:
        return [*missing, f"a user who may log in ({os.getuid()} has no name)"]
    if Path(me.pw_shell).name in NO_LOGIN:
        missing.append(f"a user who may log in (the shell of '{me.pw_name}' is {me.pw_shell})")
    return missing


def make_key(path: Path, passphrase: str = "", kind: str = "ed25519") -> Path:
    """Create a private key at `path`, and the public one at PATH.pub."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "migfw-test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Sshd:
    """A running sshd.

    client_key   an authorized private key
    host_key     the server's private key, next to HOST_KEY.pub
    log          the server's output (LogLevel VERBOSE)
    """

    folder: Path
    user: str
    port: int
    client_key: Path
    host_key: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        """For URIs: user, host and port."""
        return f"{self.user}@127.0.0.1:{self.port}"

    def known_hosts_line(self, host: str | None = None) -> str:
        kind, blob = self.host_key.with_suffix(".pub").read_text().split()[:2]
        return f"{host or f'[127.0.0.1]:{self.port}'} {kind} {blob}\n"

    def make_home(self, home: Path, *, key: bool = True, known: bool = True) -> Path:
        """A folder for HOME with .ssh: an id_ed25519 if `key`, and a known_hosts with this server if `known`."""
        settings = home / ".ssh"
        settings.mkdir(parents=True)
        settings.chmod(0o700)
        if key:
            shutil.copy(self.client_key, settings / "id_ed25519")
        (settings / "known_hosts").write_text(self.known_hosts_line() if known else "")
        return home

    def sessions(self) -> list[int]:
        """The process ids of its open connections."""
        return _descendants(self.process.pid)

    def kill_sessions(self) -> None:
        """Break every connection, as a crash of the far host would."""
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.kill_sessions()
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def running_sshd(folder: Path, *settings: str) -> Iterator[Sshd]:
    """Start an sshd in `folder`, which is created if necessary. `settings` are lines of sshd_config that override ours.

    Skips the test if a program of OpenSSH is missing.
    """
    if missing := missing_programs():
        pytest.skip(f"needs OpenSSH: {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    user = pwd.getpwuid(os.getuid()).pw_name
    client_key, host_key = make_key(folder / "client_key"), make_key(folder / "host_key")
    (folder / "authorized_keys").write_bytes(client_key.with_suffix(".pub").read_bytes())
    if os.getuid() == 0:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    for _ in range(ATTEMPTS):
        port = free_port()
        process, log = _start(folder, port, user, settings)
        sshd = Sshd(folder, user, port, client_key, host_key, log, process)
        try:
            if _answers(sshd):
                yield sshd
                return
        finally:
            sshd.stop()
    raise RuntimeError(f"sshd does not start: {log.read_text()[-2000:]}")


def _start(folder: Path, port: int, user: str, settings: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], Path]:
    config, log = folder / "sshd_config", folder / "sshd.log"
    lines = [
        *settings,
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'authorized_keys'}",
        f"AllowUsers {user}",
        "PidFile none",
        "StrictModes no",  # the folder's parents may be writable for others, as /tmp is
        "UsePAM no",
        "PermitRootLogin yes",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "AllowTcpForwarding yes",
        "AllowStreamLocalForwarding yes",
        "MaxStartups 100",
        "LogLevel VERBOSE",
    ]
    config.write_text("\n".join(lines) + "\n")
    program = find_sshd()
    assert program, "no sshd is installed"
    with log.open("wb") as stderr:
        process = subprocess.Popen([program, "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stderr=stderr)
    return process, log


def _answers(sshd: Sshd) -> bool:
    """Wait for its banner. Returns False if it has ended, because another program took the port."""
    deadline = time.monotonic() + START_SECONDS
    while sshd.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", sshd.port), 5) as probe:
            if probe.recv(4) == b"SSH-":
                return True
        if time.monotonic() > deadline:
            raise RuntimeError(f"sshd does not answer: {sshd.log.read_text()[-2000:]}")
        time.sleep(0.02)
    return False


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it ends
        return []
    return [found for child in children for found in (child, *_descendants(child))]


@contextlib.contextmanager
def running_agent(folder: Path, *keys: Path) -> Iterator[Path]:
    """Start a real ssh-agent with these keys. Yields its socket, for SSH_AUTH_SOCK; `folder` must have a short path."""
    address = folder / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", address], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not address.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("ssh-agent does not start")
            time.sleep(0.01)
        for key in keys:
            environment = {**os.environ, "SSH_AUTH_SOCK": str(address)}
            subprocess.run(["ssh-add", "-q", key], check=True, env=environment, capture_output=True)
        yield address
    finally:
        process.kill()
        process.wait()
