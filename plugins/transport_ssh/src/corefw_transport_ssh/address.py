"""Parses ssh://[USER@]HOST[:PORT]/TARGET.

A wrong URI raises UriError with what was expected. HOST may be an alias in ~/.ssh/config. Names may not contain shell
metacharacters, because they may become part of a ProxyCommand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from corefw.errors import UriError
from corefw.net.dialing import check_unix_path
from corefw.uri import MigrationUri, TcpAddress, UnixAddress, split_host_port

SSH_PORT: Final = 22

_FORMS: Final = "ssh://[USER@]HOST[:PORT]/tcp:HOST:PORT or ssh://[USER@]HOST[:PORT]/unix:PATH"
_HOST: Final = re.compile(r"[A-Za-z0-9._:%][A-Za-z0-9._:%-]*\Z")
_USER: Final = re.compile(r"[^\s\x00-\x1f\x7f'\"`$\\;&<>|(){}*?/:@-][^\s\x00-\x1f\x7f'\"`$\\;&<>|(){}*?/:@]*\Z")


Target = TcpAddress | UnixAddress
"""An address as the remote host sees it; a socket file by its absolute path."""


@dataclass(frozen=True, slots=True)
class SshAddress:
    """The parts of a URI. `user` and `port` are None if not given: then the configuration or the defaults apply."""

    user: str | None
    host: str
    port: int | None
    target: Target

    @property
    def authority(self) -> str:
        """[USER@]HOST[:PORT] as written."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port is not None else "")

    def with_target(self, target: Target) -> MigrationUri:
        return MigrationUri("ssh", f"//{self.authority}/{target}")


def parse_address(uri: MigrationUri) -> SshAddress:
    """Raises UriError."""
    if not uri.rest.startswith("//"):
        raise UriError(f"'{uri}': expected {_FORMS}")
    authority, slash, target = uri.rest[2:].partition("/")
    if not slash or not target:
        raise UriError(f"'{uri}' does not name a target on the remote host: expected {_FORMS}")
    user, host, port = parse_authority(authority, str(uri))
    return SshAddress(user, host, port, _parse_target(target, uri))


def parse_authority(text: str, what: str) -> tuple[str | None, str, int | None]:
    """[USER@]HOST[:PORT] -> (user, host, port). `what` is the whole text, for the error message."""
    user, at, place = text.rpartition("@")
    if ":" in user:
        raise UriError(f"'{what.replace(user, 'USER:...')}': no passwords here, use a key or ssh-agent")
    if at and not _USER.match(user):
        raise UriError(f"'{what}': '{user}' is not a user name")
    bracketed = re.fullmatch(r"\[([^\]]*)\]", place)
    if bracketed:
        host, port = bracketed[1], None
    elif ":" in place:
        host, port = split_host_port(place, what)
        if port == 0:
            raise UriError(f"'{what}': '0' is not a port of an sshd, expected a number from 1 to 65535")
    else:
        host, port = place, None
    if not host:
        raise UriError(f"'{what}' names no host: expected {_FORMS}")
    if not _HOST.match(host):
        raise UriError(f"'{what}': '{host}' is not a host name")
    return user or None, host, port


def _parse_target(text: str, uri: MigrationUri) -> Target:
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "tcp":
        host, port = split_host_port(rest, str(uri))
        return TcpAddress(host, port)
    if colon and scheme == "unix":
        check_unix_path(rest, uri)
        if not rest.startswith("/"):
            raise UriError(
                f"'{uri}': expected the absolute path of a socket on the remote host, as in unix:/run/guest.sock"
            )
        return UnixAddress(rest)
    raise UriError(f"'{uri}': '{text}' is not something that sshd can connect to: expected tcp:HOST:PORT or unix:PATH")
