"""Parses zmq:tcp://HOST:PORT[?OPTIONS] and zmq:ipc://PATH[?OPTIONS].

OPTIONS are NAME=VALUE joined by "&"; %XX stands for any byte in a value. As in ZeroMQ, "*" means every address and, as
a port, any free one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from corefw.errors import UriError
from corefw.net.dialing import check_unix_path
from corefw.uri import MigrationUri, TcpAddress, UnixAddress, join_host_port, split_host_port
from corefw_transport_zmq.keys import OPTIONS

_FORMS: Final = "zmq:tcp://HOST:PORT or zmq:ipc://PATH"


Place = TcpAddress | UnixAddress


def endpoint(place: Place) -> str:
    """As ZeroMQ writes it: tcp://HOST:PORT, where every address is "*", or ipc://PATH."""
    if isinstance(place, UnixAddress):
        return f"ipc://{place.path}"
    return f"tcp://{join_host_port(place.host or '*', place.port)}"


@dataclass(frozen=True, slots=True)
class ZmqAddress:
    """A parsed URI. `query` is the options as written, with the "?"."""

    place: Place
    options: Mapping[str, str]
    query: str

    def at(self, place: Place) -> MigrationUri:
        return MigrationUri("zmq", f"{endpoint(place)}{self.query}")


def parse_address(uri: MigrationUri) -> ZmqAddress:
    """Raises UriError."""
    written, question, query = uri.rest.partition("?")
    kind, slashes, rest = written.partition("://")
    if not slashes or kind not in _PLACES or not rest:
        raise UriError(f"'{uri}': expected {_FORMS}")
    place = _PLACES[kind](rest, uri)
    return ZmqAddress(place, _parse_options(query, uri) if question else {}, question + query)


def _tcp(rest: str, uri: MigrationUri) -> Place:
    if rest.endswith(":*"):
        rest = rest[:-1] + "0"
    host, port = split_host_port(rest, str(uri))
    if any(character in host for character in "/;@ "):
        raise UriError(f"'{uri}': '{host}' is not a host name")
    return TcpAddress("" if host == "*" else host, port)


def _ipc(rest: str, uri: MigrationUri) -> Place:
    if rest == "*":
        raise UriError(f"'{uri}': expected a path, or @NAME for a name in the abstract space")
    check_unix_path(rest, uri)
    return UnixAddress(rest)


_PLACES: Final = {"tcp": _tcp, "ipc": _ipc}


def _parse_options(query: str, uri: MigrationUri) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in query.split("&"):
        name, equals, value = pair.partition("=")
        if name not in OPTIONS:
            raise UriError(f"'{uri}': unknown option '{name}', expected {', '.join(OPTIONS)}")
        if name in options:
            raise UriError(f"'{uri}': option '{name}' is given twice")
        if not equals or not value:
            raise UriError(f"'{uri}': option '{name}' needs a value, as in {name}=FILE")
        options[name] = unquote(value)
    return options
