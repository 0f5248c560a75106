"""Checks host keys against known_hosts.

Invariant: a key is accepted only if a line has exactly this key for exactly this host and no line revokes it. Otherwise
it is refused, with the conflicting line and what to do. The files are never written.

The format is that of sshd(8): [@MARKER] HOSTS KIND BASE64. HOSTS are patterns separated by commas (with *, ? and !),
"[HOST]:PORT" for ports other than 22, or "|1|SALT|HASH" of one name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from corefw.errors import ChannelError
from corefw_transport_ssh.address import SSH_PORT

_REVOKED: Final = "@revoked"


@dataclass(frozen=True, slots=True)
class KnownKey:
    """One line of a known_hosts file."""

    file: Path
    line: int
    marker: str
    hosts: str
    kind: str
    blob: bytes

    def is_for(self, name: str) -> bool:
        if self.hosts.startswith("|1|"):
            return _hashed(self.hosts, name)
        matched = False
        for pattern in self.hosts.lower().split(","):
            negated = pattern.startswith("!")
            if fnmatchcase(name, _literal_brackets(pattern.removeprefix("!"))):
                if negated:
                    return False
                matched = True
        return matched


def read_known_hosts(files: Iterable[Path]) -> list[KnownKey]:
    """All valid lines of all existing files. Raises ChannelError if a file cannot be read."""
    found = []
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ChannelError(f"cannot read {file}: {error.strerror}") from None
        for number, line in enumerate(text.splitlines(), 1):
            if known := _parse(file, number, line):
                found.append(known)
    return found


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """The name of a host in known_hosts: its HostKeyAlias, or host and port."""

    host: str
    port: int
    alias: str | None = None

    @property
    def name(self) -> str:
        if self.alias:
            return self.alias.lower()
        host = self.host.lower()
        return host if self.port == SSH_PORT else f"[{host}]:{self.port}"

    def known(self, keys: Sequence[KnownKey]) -> list[KnownKey]:
        """The lines for this host. As in OpenSSH, a line without a port applies to all ports that have no line of their
        own."""
        by_name = [key for key in keys if key.is_for(self.name)]
        if by_name or self.alias or self.port == SSH_PORT:
            return by_name
        return [key for key in keys if key.is_for(self.host.lower())]


def known_kinds(identity: HostIdentity, keys: Sequence[KnownKey]) -> list[str]:
    """Kinds of key to request from the host: those in known_hosts."""
    return list(dict.fromkeys(key.kind for key in identity.known(keys) if not key.marker))


def check_host_key(
    identity: HostIdentity, kind: str, blob: bytes, keys: Sequence[KnownKey], files: Sequence[Path]
) -> None:
    """Check a host's key. Raises ChannelError if it is unknown, changed or revoked."""
    shown = f"{kind} {fingerprint(blob)}"
    lines = identity.known(keys)
    for line in lines:
        if line.marker == _REVOKED and line.blob == blob:
            raise ChannelError(
                f"THE HOST KEY OF '{identity.name}' IS REVOKED ({shown}, at {line.file}:{line.line}): refused"
            )
    usable = [line for line in lines if not line.marker]
    if any(line.kind == kind and line.blob == blob for line in usable):
        return
    if usable:
        old = next((line for line in usable if line.kind == kind), usable[0])
        remove = shlex.join(["ssh-keygen", "-f", str(old.file), "-R", identity.name])
        raise ChannelError(
            f"THE HOST KEY OF '{identity.name}' HAS CHANGED: it is {shown}, but {old.file}:{old.line} has "
            f"{old.kind} {fingerprint(old.blob)}; someone may be intercepting the connection. "
            f"If it really has a new key, forget the old one with: {remove}"
        )
    raise ChannelError(
        f"the host key of '{identity.name}' is not known: {shown}. If the host itself shows the same "
        f"(ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub), accept it with: {_how_to_accept(identity, files)}"
    )


def _how_to_accept(identity: HostIdentity, files: Sequence[Path]) -> str:
    if identity.alias or not files:
        return shlex.join(["ssh", identity.host])
    port = [] if identity.port == SSH_PORT else ["-p", str(identity.port)]
    return f"{shlex.join(['ssh-keyscan', *port, identity.host])} >> {_short(files[0])}"


def _short(file: Path) -> str:
    home = Path("~").expanduser()
    return f"~/{shlex.quote(str(file.relative_to(home)))}" if file.is_relative_to(home) else shlex.quote(str(file))


def fingerprint(blob: bytes) -> str:
    """The fingerprint as `ssh-keygen -l` prints it: SHA256:..."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _parse(file: Path, number: int, line: str) -> KnownKey | None:
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    marker = words.pop(0) if words[0].startswith("@") else ""
    if len(words) < 3:
        return None
    try:
        return KnownKey(file, number, marker, words[0], words[1], base64.b64decode(words[2], validate=True))
    except binascii.Error:
        return None


def _hashed(hosts: str, name: str) -> bool:
    try:
        _, _, salt, digest = hosts.split("|")
        expected = base64.b64decode(digest)
        return hmac.compare_digest(hmac.digest(base64.b64decode(salt), name.encode(), "sha1"), expected)
    except (ValueError, binascii.Error):
        return False


def _literal_brackets(pattern: str) -> str:
    """Escape "[" for fnmatch: known_hosts has no character classes."""
    return pattern.replace("[", "[[]")
