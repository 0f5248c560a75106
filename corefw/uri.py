"""Migration URIs, and the addresses that several schemes share.

A URI is a scheme, a colon, and a rest that only the scheme's transport understands. The core knows no scheme.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from corefw.errors import UriError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*\Z")
_NO_UTF8 = re.compile("[\ud800-\udfff]")  # Python's stand-ins for bytes of the command line that are not UTF-8


@dataclass(frozen=True, slots=True)
class MigrationUri:
    """`tcp:10.0.0.7:4444` is scheme "tcp" and rest "10.0.0.7:4444"."""

    scheme: str
    rest: str

    @classmethod
    def parse(cls, text: str) -> MigrationUri:
        if _NO_UTF8.search(text):
            raise UriError(f"'{_NO_UTF8.sub(_escape, text)}' is not a migration URI: a URI has to be UTF-8")
        scheme, colon, rest = text.partition(":")
        if not colon or not _SCHEME.match(scheme):
            raise UriError(
                f"'{text}' is not a migration URI: expected SCHEME:ADDRESS, such as tcp:HOST:PORT or unix:PATH"
            )
        if not rest:
            raise UriError(f"'{text}' has no address: expected something after '{scheme}:'")
        return cls(scheme, rest)

    def __str__(self) -> str:
        return f"{self.scheme}:{self.rest}"

    # -- layers: zstd+tcp:10.0.0.7:4444 ----------------------------------------------------------------------------

    def drivers(self) -> tuple[str, ...]:
        """The entry points that may make this URI's transport, best first: "zstd+tcp", then the layer "zstd+"."""
        layer, plus, _ = self.scheme.partition("+")
        return (self.scheme, f"{layer}+") if plus else (self.scheme,)

    def below_layer(self) -> MigrationUri:
        """The URI that a layer stands on: tcp:10.0.0.7:4444 of zstd+tcp:10.0.0.7:4444. Raises UriError."""
        layer, plus, scheme = self.scheme.partition("+")
        if not plus or not scheme:
            raise UriError(f"'{self}': expected {layer}+URI, as in {layer}+tcp:HOST:PORT")
        return MigrationUri.parse(f"{scheme}:{self.rest}")

    def with_layer(self, layer: str) -> MigrationUri:
        """The inverse of below_layer: with_layer("zstd") puts zstd+ in front."""
        return MigrationUri(f"{layer}+{self.scheme}", self.rest)


def _escape(found: re.Match[str]) -> str:
    """The byte as an escape."""
    return f"\\x{ord(found[0]) - 0xDC00:02x}" if "\udc80" <= found[0] <= "\udcff" else f"\\u{ord(found[0]):04x}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """An empty host is every address of this host to listen at, and this host to dial."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:{join_host_port(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file; "@name" is a name in Linux's abstract space."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


def split_host_port(text: str, what: str) -> tuple[str, int]:
    """Split "example.org:4444", "10.0.0.7:0", "[::1]:4444" or ":4444" (every address) into host and port.

    `what` is the whole URI, for the message. Raises UriError, also for an IPv6 address without brackets.
    """
    if text.startswith("//"):
        raise UriError(f"'{what}': {what.partition(':')[0]}: takes no //, expected {what.replace('//', '', 1)}")
    bracketed = re.fullmatch(r"\[([^\[\]]*)\]:(.*)", text)
    host, colon, port = (bracketed[1], ":", bracketed[2]) if bracketed else text.rpartition(":")
    if not colon or (text.startswith("[") and not bracketed):
        raise UriError(f"'{what}' has no port: expected HOST:PORT, or [HOST]:PORT for an IPv6 address")
    if ":" in host and not bracketed:
        raise UriError(f"'{what}': put an IPv6 address in brackets, as in [{host}]:{port}")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UriError(f"'{what}': '{port}' is not a port, expected a number from 0 to 65535")
    return host, int(port)


def check_dialled_port(port: int, what: str) -> None:
    """Raise UriError for port 0, which asks for a free port to listen at and cannot be dialled."""
    if port == 0:
        raise UriError(f"'{what}': port 0 is only for listening, expected the port that the listener reports")


def join_host_port(host: str, port: int) -> str:
    """Join host and port; the inverse of split_host_port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
