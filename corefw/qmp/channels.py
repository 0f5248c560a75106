"""Turns the `channels` argument of migrate and migrate-incoming (QEMU 8.2) into the URI that means the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from corefw.qmp.protocol import QmpError
from corefw.uri import join_host_port

_SHELL: Final = ["/bin/sh", "-c"]
_UNSUPPORTED: Final = (
    *("ipv4", "ipv6", "to", "keep-alive", "keep-alive-count", "keep-alive-idle", "keep-alive-interval", "mptcp"),
    "numeric",
)


def uri_of(uri: str, channels: Sequence[Mapping[str, Any]]) -> str:
    """Whichever of the two was given, as a URI. Raises QmpError if none or both were, or if no URI means the same."""
    if uri and channels:
        raise QmpError("need either 'uri' or 'channels' argument")
    if uri:
        return uri
    if not channels:
        raise QmpError("Parameter 'uri' is missing")
    if len(channels) > 1:
        raise QmpError("Channel list must have only one entry, for type 'main'")
    (channel,) = channels
    if channel["channel-type"] != "main":
        raise QmpError(f"channel-type '{channel['channel-type']}' is not supported: expected 'main'")
    return _address(channel["addr"])


def _address(address: Mapping[str, Any]) -> str:
    match address["transport"]:
        case "exec":
            return f"exec:{_command(address['args'])}"
        case "file":
            offset = f",offset={address['offset']}" if address["offset"] else ""
            return f"file:{address['filename']}{offset}"
        case "socket":
            return _socket(address)
        case other:
            raise QmpError(f"transport '{other}' is not supported: expected socket, exec or file")


def _command(arguments: list[str]) -> str:
    if not arguments:
        raise QmpError("transport 'exec' expects a command in 'args'")
    return arguments[2] if arguments[:2] == _SHELL and len(arguments) == 3 else shlex.join(arguments)


def _socket(address: Mapping[str, Any]) -> str:
    match address["type"]:
        case "inet":
            for name in _UNSUPPORTED:
                if address.get(name) not in (None, False):
                    raise QmpError(f"'{name}' of a socket address is not supported: leave it out")
            port = str(address["port"])
            if not port.isdecimal():
                raise QmpError(f"port '{port}' of a socket address is not a number")
            return f"tcp:{join_host_port(address['host'], int(port))}"
        case "unix":
            return f"unix:{'@' if address.get('abstract') else ''}{address['path']}"
        case "fd":
            return f"fd:{address['str']}"
        case other:
            raise QmpError(f"a socket address of type '{other}' is not supported: expected inet, unix or fd")
