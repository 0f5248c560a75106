"""How a migration reaches its destination; a relay for a real QEMU whose transports do not suffice.

A QEMU migrates over a transport that it does not support by sending into a socket of this process, which relays. It is
given one end of a socket pair with `getfd`, so it needs no path in common with this process: it may run in a container,
a chroot, or a service with a private /tmp. Only if its QMP is reached over TCP, which carries no descriptors, does it
dial a UNIX socket, in a folder that only this user can enter.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from corefw.channel import Transport
from corefw.client.changes import installed
from corefw.errors import ChannelError
from corefw.net import descriptors
from corefw.net.relay import Relay
from corefw.qmp.client import QmpClient, QmpError
from corefw.qmp.engines import EngineClient
from corefw.states import MigrationStatus
from corefw.uri import MigrationUri, UnixAddress, check_dialled_port, split_host_port

if TYPE_CHECKING:
    from corefw.settings import Settings


QEMU_TWO_WAY: Final = {"tcp": True, "unix": True, "vsock": True, "rdma": True, "exec": False, "fd": None}
"""The URI schemes of every QEMU -> whether they have a return path; None if that depends on the descriptor."""

_QEMU_FILE_SINCE: Final = (8, 2)
"""The first version of QEMU with file: URIs."""


@dataclass(frozen=True, slots=True)
class Route:
    """How a migration reaches its destination.

    relayed       this process forwards the bytes between a QEMU and the transport
    return_path   whether the route has one; None if unknown
    """

    relayed: bool
    return_path: bool | None


def find_transport(uri: str, settings: Settings | None = None) -> Transport:
    """Find the transport of a URI in this process. Raises UriError, PluginError."""
    return installed().transport(uri, installed().settings() if settings is None else settings)


def find_route(engine: EngineClient, uri: str) -> Route:
    """Find out how to reach a URI, before anything is changed.

    The process that will dial decides whether a URI is valid: an engine has its own descriptors (fd:), directory
    (file:, unix:) and plugins; a relay has those of this process. Raises UriError for an unknown scheme, a wrong
    address or one that only receives, and UsageError if the engine refuses it.
    """
    parsed = MigrationUri.parse(uri)
    if engine.is_migfw:
        return Route(relayed=False, return_path=engine.call("x-migfw-transport", uri=uri)["return-path"])
    if _qemu_knows(engine, parsed):
        return Route(relayed=False, return_path=QEMU_TWO_WAY.get(parsed.scheme, False))
    transport = find_transport(uri)
    transport.check_outgoing()
    return Route(relayed=True, return_path=transport.features.return_path)


def _qemu_knows(engine: EngineClient, uri: MigrationUri) -> bool:
    """Whether a QEMU can dial this URI itself. Raises UriError for a wrong address."""
    if uri.scheme == "tcp":
        _, port = split_host_port(uri.rest, str(uri))
        check_dialled_port(port, str(uri))
    if uri.scheme == "unix":
        return not uri.rest.startswith("@")  # QEMU's URIs cannot name abstract sockets
    if uri.scheme == "file":
        version = engine.call("query-version")["qemu"]
        return (version["major"], version["minor"]) >= _QEMU_FILE_SINCE
    return uri.scheme in QEMU_TWO_WAY


# -- a relay for a real QEMU -------------------------------------------------------------------------------------------


_SETTLE: Final = 2.0
"""Seconds for the relay to find out why it broke, if QEMU noticed first."""

_FAREWELL: Final = 10.0
"""Seconds for the relay to end by itself after the guest has moved, while QEMU closes its socket."""

_LOOK: Final = 0.1

_NAME: Final = "migfw-relay"
"""Name of the descriptor on both sides."""


class QemuRelay:
    """Relays the migration of a QEMU to `target`. Use it as a context manager, and make the QEMU migrate to
    `relay.uri`.

    Send that command over `client`, because QEMU keeps descriptors by connection. If the relay breaks, its error is the
    reason, not what QEMU reports. Once the guest has moved, the far side sees the stream end. Raises UriError,
    ChannelError, QmpError.
    """

    def __init__(self, target: Transport, client: QmpClient) -> None:
        self._far = str(target.uri)
        self._given_up = False
        with contextlib.ExitStack() as undo:
            passes_fds = isinstance(client.address, UnixAddress)
            self.uri: Final = _hand_over(client, undo) if passes_fds else _private_socket(undo)
            self._relay = Relay(find_transport(self.uri), target)
            self._tidy_up = undo.pop_all()

    def has_failed(self) -> bool:
        """Whether the relay has broken, so that the migration should be cancelled."""
        self._given_up = self._relay.failure is not None
        return self._given_up

    def finish(self, answer: Mapping[str, Any], *, return_path: bool, interrupted: Callable[[], bool]) -> str | None:
        """Return what went wrong, or None, after QEMU's migration has ended with this `answer` of query-migrate.

        Without a return path, waits until the last byte has left this process: the stream is not complete before. Stops
        waiting if `interrupted()`.
        """
        status = answer["status"]
        if status == MigrationStatus.COMPLETED:
            if not return_path:
                return self._drain(interrupted)
            self._relay.wait(_FAREWELL)
            return None
        if status == MigrationStatus.FAILED:
            self._relay.wait(_SETTLE)
            if self._relay.failure is None:
                return f"QEMU reported: {answer.get('error-desc', 'no reason')}"
            return self._failure()
        return self._failure() if self._given_up else None

    def _drain(self, interrupted: Callable[[], bool]) -> str | None:
        while not self._relay.wait(_LOOK):
            if interrupted():
                return "interrupted before everything from QEMU was forwarded"
        return f"QEMU had sent everything, but {self._failure()}" if self._relay.failure else None

    def _failure(self) -> str:
        """Why the relay broke, with its two sides named as they are known here."""
        sides = {
            "the FROM side of the relay": "QEMU's side",
            "the TO side of the relay": f"the side of {self._far}",
        }
        text = str(self._relay.failure)
        for side, name in sides.items():
            text = text.replace(side, name)
        return text

    def __enter__(self) -> Self:
        try:
            self._relay.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._relay.close()
        self._tidy_up.close()


def _private_socket(undo: contextlib.ExitStack) -> str:
    """The URI of a socket that can be created in a private folder."""
    folder = Path(tempfile.mkdtemp(prefix="migfw-relay-"))
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    return f"unix:{folder}/qemu"


def _hand_over(client: QmpClient, undo: contextlib.ExitStack) -> str:
    """Give QEMU one end of a socket pair. The returned URI means that end in QEMU, and our end in this process."""
    ours, theirs = socket.socketpair()
    with theirs:
        descriptors.put(_NAME, ours.detach())
        undo.callback(descriptors.discard, _NAME)
        client.execute("getfd", {"fdname": _NAME}, [theirs.fileno()])
    undo.callback(_take_back, client)
    return f"fd:{_NAME}"


def _take_back(client: QmpClient) -> None:
    """Close the descriptor that QEMU still has if it never migrated. If it did, or has ended, there is none."""
    with contextlib.suppress(QmpError, ChannelError):
        client.execute("closefd", {"fdname": _NAME})
