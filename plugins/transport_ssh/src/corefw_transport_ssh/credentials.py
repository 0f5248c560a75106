"""Our private keys, from ssh-agent and from files.

Invariant: nothing ever asks for a password. A key file with a passphrase only works through ssh-agent, and the error
says so. As in OpenSSH, a key file that others can read is not used. The error lists everything that was tried.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import shlex
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import paramiko
from paramiko.agent import AgentKey, AgentSSH

from corefw_transport_ssh.config import Destination
from corefw_transport_ssh.known_hosts import fingerprint

LIST_SECONDS: Final = 10.0
SIGN_SECONDS: Final = 60.0
"""Seconds for a signature: an agent may ask its user, or wait for a touch."""


class Agent(AgentSSH):
    """An agent at a socket. paramiko's own supports only $SSH_AUTH_SOCK and waits for ever."""

    def __init__(self, path: str) -> None:
        """Raises OSError, paramiko.SSHException."""
        super().__init__()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(LIST_SECONDS)
            sock.connect(path)
            self._connect(sock)  # type: ignore[attr-defined]  # called by paramiko's own subclasses; not in its stubs
            sock.settimeout(SIGN_SECONDS)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        self._close()  # type: ignore[attr-defined]  # as above


class Credentials:
    """The keys to offer to one destination, most likely first.

    offered    the keys that were tried, for the error
    unusable   the keys that could not be tried, and why
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._agent: Agent | None = None
        self.offered: list[str] = []
        self.unusable: list[str] = []

    def __iter__(self) -> Iterator[paramiko.PKey]:
        """Load keys one by one: a file is not read if an earlier key was accepted."""
        tried = set()
        for key in self._from_agent():
            tried.add(key.asbytes())
            self.offered.append(f"{_kind(key)} key {fingerprint(key.asbytes())} of ssh-agent")
            yield key
        for file in self._destination.identity_files:
            if _public_blob(file) in tried:
                continue
            loaded = self._from_file(file)
            if loaded and loaded.asbytes() not in tried:
                tried.add(loaded.asbytes())
                self.offered.append(str(file))
                yield loaded

    def close(self) -> None:
        if self._agent:
            self._agent.close()

    def _from_agent(self) -> list[AgentKey]:
        """The agent's keys, configured ones first: a server disconnects after a few wrong ones."""
        if not self._destination.agent:
            return []
        try:
            self._agent = Agent(self._destination.agent)
        except (OSError, paramiko.SSHException) as error:
            self.unusable.append(f"ssh-agent at {self._destination.agent}: {error}")
            return []
        named = {_public_blob(file) for file in self._destination.identity_files}
        keys = sorted(self._agent.get_keys(), key=lambda key: key.asbytes() not in named)
        return [key for key in keys if key.asbytes() in named] if self._destination.identities_only else keys

    def _from_file(self, file: Path) -> paramiko.PKey | None:
        try:
            mode = file.stat().st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                self.unusable.append(f"{file} can be read by others (chmod 600 {shlex.quote(str(file))})")
                return None
            return paramiko.PKey.from_path(file)
        except FileNotFoundError:
            return None
        except (paramiko.PasswordRequiredException, TypeError):  # TypeError is what the cryptography package raises
            self.unusable.append(f"{file} has a passphrase (give it to ssh-agent: ssh-add {shlex.quote(str(file))})")
        except OSError as error:
            self.unusable.append(f"{file}: {error.strerror}")
        except (paramiko.SSHException, paramiko.pkey.UnknownKeyType, ValueError):
            self.unusable.append(f"{file} is not a private key that can be used here")
        return None


def _kind(key: paramiko.PKey) -> str:
    return key.get_name().removeprefix("ssh-")


def _public_blob(file: Path) -> bytes | None:
    """The public key in the .pub file beside a private key, readable without the passphrase."""
    with contextlib.suppress(OSError, ValueError, IndexError, binascii.Error):
        return base64.b64decode(Path(f"{file}.pub").read_text().split()[1])
    return None
