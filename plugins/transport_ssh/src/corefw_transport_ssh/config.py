"""Reads ~/.ssh/config: address, user, keys and proxies of a host.

Precedence: the URI, ~/.ssh/config, /etc/ssh/ssh_config, OpenSSH's defaults; the first value counts. Paths use $HOME.
The files are read for every connection.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import paramiko

from corefw.errors import ChannelError
from corefw_transport_ssh.address import SSH_PORT

USER_CONFIG: Final = "~/.ssh/config"
SYSTEM_CONFIG: Final = "/etc/ssh/ssh_config"
SYSTEM_KNOWN_HOSTS: Final = "/etc/ssh/ssh_known_hosts"
DEFAULT_KEYS: Final = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
CONNECT_SECONDS: Final = 15
INCLUDE_DEPTH: Final = 16


@dataclass(frozen=True, slots=True)
class Destination:
    """An sshd and how to log in.

    alias            the host as in the URI
    key_name         the name of its key in known_hosts, if HostKeyAlias sets one
    identity_files   private keys to try, in this order
    agent            the agent's socket, or None
    identities_only  use only those of the agent's keys that identity_files name
    known_hosts      files; the first one is the user's own
    proxy_command    a shell command whose standard input and output are the connection
    proxy_jump       jump hosts, as [USER@]HOST[:PORT]
    """

    alias: str
    host: str
    port: int
    user: str
    key_name: str | None
    identity_files: tuple[Path, ...]
    agent: str | None
    identities_only: bool
    known_hosts: tuple[Path, ...]
    proxy_command: str | None
    proxy_jump: tuple[str, ...]
    connect_seconds: int


def find_destination(user: str | None, host: str, port: int | None) -> Destination:
    """Look up a host. Raises ChannelError if a configuration file cannot be read or parsed."""
    found = _lookup(user, host, port)
    jump = found.get("proxyjump") or "none"
    agent = found.get("identityagent") or "SSH_AUTH_SOCK"
    return Destination(
        alias=host,
        host=found["hostname"],
        port=_number(found, "port", SSH_PORT, host),
        user=found["user"],
        key_name=found.get("hostkeyalias"),
        identity_files=_identity_files(found),
        agent=_agent(agent),
        identities_only=found.get("identitiesonly", "no").lower() == "yes",
        known_hosts=_known_hosts(found),
        proxy_command=found.get("proxycommand") if jump == "none" else None,
        proxy_jump=() if jump == "none" else tuple(part.strip() for part in jump.split(",")),
        connect_seconds=_number(found, "connecttimeout", CONNECT_SECONDS, host),
    )


class _Config(paramiko.SSHConfig):
    """Refuses `Match exec`, whose command paramiko would run with our standard input."""

    def _tokenize(self, config: paramiko.SSHConfigDict, host: str, key: str, value: str) -> str:
        if key == "match-exec":
            raise ValueError("'Match exec' is not supported here (use Host blocks)")
        tokenized: str = super()._tokenize(config, host, key, value)  # type: ignore[misc]  # not in the stubs
        return tokenized


def _lookup(user: str | None, host: str, port: int | None) -> paramiko.SSHConfigDict:
    lines = ["Host *"]  # values from the URI come first, so they win
    if user:
        lines.append(f"User {user}")
    if port is not None:
        lines.append(f"Port {port}")
    try:
        for file in (Path(USER_CONFIG).expanduser(), Path(SYSTEM_CONFIG)):
            lines.append("Host *")
            lines += _included(file, "Host *", file.parent)
        lines += ["Host *", f"User {_present_user()}"]
        return _Config.from_text("\n".join(lines)).lookup(host)
    except (OSError, ValueError, paramiko.SSHException) as error:
        raise ChannelError(f"cannot use the ssh configuration for '{host}': {error}") from None


def _included(file: Path, block: str, folder: Path, depth: int = 0) -> Iterator[str]:
    """The lines of a file with Include lines expanded. `block` is the Host or Match line around an Include, which
    applies again after it."""
    if depth > INCLUDE_DEPTH:
        raise OSError(f"{file} includes itself")
    with contextlib.suppress(FileNotFoundError, IsADirectoryError), file.open() as lines:
        for line in lines:
            words = line.replace("=", " ", 1).split(None, 1)
            keyword = words[0].lower() if words else ""
            if keyword in ("host", "match"):
                block = line.rstrip("\n")
            if keyword != "include" or len(words) < 2:
                yield line.rstrip("\n")
                continue
            for pattern in shlex.split(words[1], comments=True):
                for path in sorted(glob.glob(str(folder / Path(pattern).expanduser()))):  # noqa: PTH207 - any pattern
                    yield from _included(Path(path), block, folder, depth + 1)
                    yield block


def _present_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return os.environ.get("USER") or str(os.getuid())


def _number(found: paramiko.SSHConfigDict, key: str, default: int, host: str) -> int:
    text = found.get(key, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ChannelError(f"cannot use the ssh configuration for '{host}': '{text}' is not a number for {key}")
    return int(text)


def _identity_files(found: paramiko.SSHConfigDict) -> tuple[Path, ...]:
    listed = found.get("identityfile")  # a list despite its type: the keyword may be repeated
    names = [str(name) for name in listed] if listed else list(DEFAULT_KEYS)
    return tuple(Path(name).expanduser() for name in names if name.lower() != "none")


def _agent(setting: str) -> str | None:
    if setting.lower() == "none":
        return None
    if setting == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK")
    if setting.startswith("$"):
        return os.environ.get(setting.strip("${}"))
    return str(Path(setting).expanduser())


def _known_hosts(found: paramiko.SSHConfigDict) -> tuple[Path, ...]:
    users = shlex.split(found.get("userknownhostsfile") or "~/.ssh/known_hosts ~/.ssh/known_hosts2")
    systems = shlex.split(found.get("globalknownhostsfile") or SYSTEM_KNOWN_HOSTS)
    return tuple(Path(name).expanduser() for name in (*users, *systems) if name.lower() != "none")
