"""Which way a migration goes: by the engine itself, or relayed by this process for a real QEMU.

A wrong URI is refused here, before anything is changed. It is the dialling process that knows: an engine has its own
descriptors (fd:), folder (file:, unix:) and plugins; for a relay they are this process's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from corefw.channel import Transport
from corefw.cli.engines import EngineClient
from corefw.uri import MigrationUri, check_dialled_port, split_host_port

if TYPE_CHECKING:
    from corefw.plugins import Plugins

QEMU_TWO_WAY: Final = {"tcp": True, "unix": True, "vsock": True, "rdma": True, "exec": False, "fd": None}
"""Schemes of every QEMU -> whether bytes flow back; None: that depends on the descriptor, so the setting stays."""

_QEMU_FILE_SINCE: Final = (8, 2)
"""The QEMU that first knew file:."""


@dataclass(frozen=True, slots=True)
class Route:
    """relayed       this process carries the bytes between the QEMU and the transport
    return_path   whether there is one; None: unknown"""

    relayed: bool
    return_path: bool | None


def find_transport(uri: str) -> Transport:
    """The transport of a URI, in this process. Raises UriError, PluginError."""
    return _plugins().transport(uri)


@cache
def _plugins() -> Plugins:
    from corefw.plugins import Plugins

    return Plugins.load()


def find_route(engine: EngineClient, uri: str) -> Route:
    """Raises UriError (no such scheme, a wrong address, one that only receives), UsageError with what the engine said
    of it."""
    parsed = MigrationUri.parse(uri)
    if engine.is_migfw:
        return Route(relayed=False, return_path=engine.call("x-migfw-transport", uri=uri)["return-path"])
    if _qemu_knows(engine, parsed):
        return Route(relayed=False, return_path=QEMU_TWO_WAY.get(parsed.scheme, False))
    transport = find_transport(uri)
    transport.check_outgoing()
    return Route(relayed=True, return_path=transport.features.return_path)


def _qemu_knows(engine: EngineClient, uri: MigrationUri) -> bool:
    """Whether a QEMU itself dials this URI as it is written. Raises UriError for an address that is wrong."""
    if uri.scheme == "tcp":
        _, port = split_host_port(uri.rest, str(uri))
        check_dialled_port(port, str(uri))
    if uri.scheme == "unix":
        return not uri.rest.startswith("@")  # an abstract name; QEMU's URIs have only paths
    if uri.scheme == "file":
        version = engine.call("query-version")["qemu"]
        return (version["major"], version["minor"]) >= _QEMU_FILE_SINCE
    return uri.scheme in QEMU_TWO_WAY
