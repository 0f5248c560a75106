"""Moves a real QEMU over a transport that it does not know: it sends into a socket of ours, and this process relays.

QEMU gets one end of a socket pair by `getfd`, so it needs no path in common with this process: it may be in a
container, a chroot, or a service with a private /tmp. Only where its QMP is reached over TCP, which carries no
descriptors, does it dial a UNIX socket instead, in a folder that only this user can enter.

Where the relay broke, the relay says why; what QEMU says only follows from that. Where the guest has moved, nothing is
broken off: the far side sees the stream end.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from corefw.cli.interrupts import Interrupts
from corefw.cli.routes import find_transport
from corefw.errors import ChannelError
from corefw.net import descriptors
from corefw.net.relay import Relay
from corefw.qmp.address import UnixAddress
from corefw.qmp.client import QmpClient, QmpError
from corefw.states import MigrationStatus

_SETTLE: Final = 2.0
"""Seconds for the relay to find out why it broke, when QEMU was quicker to see that it did."""

_FAREWELL: Final = 10.0
"""Seconds for the relay to end by itself when the guest has moved: as long as QEMU needs to close its socket."""

_LOOK: Final = 0.1

_NAME: Final = "migfw-relay"
"""Of the descriptor, on both sides."""


class QemuRelay:
    """`with QemuRelay(uri, client) as relay:`, and tell the QEMU to migrate to `relay.uri`, over that client: QEMU
    keeps descriptors by connection. Raises UriError, ChannelError, QmpError."""

    def __init__(self, uri: str, client: QmpClient) -> None:
        target = find_transport(uri)
        self._far = uri
        self._given_up = False
        with contextlib.ExitStack() as undo:
            passes_fds = isinstance(client.address, UnixAddress)
            self.uri: Final = _hand_over(client, undo) if passes_fds else _private_socket(undo)
            self._relay = Relay(find_transport(self.uri), target)
            self._tidy_up = undo.pop_all()

    def has_failed(self) -> bool:
        """Whether there is nothing to wait for any more; the migration is to be cancelled then."""
        self._given_up = self._relay.failure is not None
        return self._given_up

    def finish(self, answer: Mapping[str, Any], capabilities: Mapping[str, bool], interrupts: Interrupts) -> str | None:
        """After QEMU's migration has ended with this `answer` of query-migrate: what went wrong, or None.

        A stream that the destination did not confirm on the return path is whole there only when the last byte has left
        here: this waits for that.
        """
        status = answer["status"]
        if status == MigrationStatus.COMPLETED:
            if not capabilities.get("return-path"):
                return self._drain(interrupts)
            self._relay.wait(_FAREWELL)
            return None
        if status == MigrationStatus.FAILED:
            self._relay.wait(_SETTLE)
            if self._relay.failure is None:
                return f"QEMU says: {answer.get('error-desc', 'nothing of the reason')}"
            return self._failure()
        return self._failure() if self._given_up else None

    def _drain(self, interrupts: Interrupts) -> str | None:
        while not self._relay.wait(_LOOK):
            if interrupts.requested:
                return "interrupted before everything from QEMU was forwarded"
        return f"QEMU had sent everything, but {self._failure()}" if self._relay.failure else None

    def _failure(self) -> str:
        """Why the relay broke, with its two sides called by what they are here."""
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
    """The URI of a socket, still to be made, in a folder of this user's."""
    folder = Path(tempfile.mkdtemp(prefix="migfw-relay-"))
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    return f"unix:{folder}/qemu"


def _hand_over(client: QmpClient, undo: contextlib.ExitStack) -> str:
    """Give the QEMU one end of a socket pair; the URI that means it there, and our end here."""
    ours, theirs = socket.socketpair()
    with theirs:
        descriptors.put(_NAME, ours.detach())
        undo.callback(descriptors.discard, _NAME)
        client.execute("getfd", {"fdname": _NAME}, [theirs.fileno()])
    undo.callback(_take_back, client)
    return f"fd:{_NAME}"


def _take_back(client: QmpClient) -> None:
    """Close what the QEMU still keeps, where it never came to migrate. One that used it, or has gone, keeps nothing."""
    with contextlib.suppress(QmpError, ChannelError):
        client.execute("closefd", {"fdname": _NAME})
