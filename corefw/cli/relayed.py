"""A real QEMU over a transport that it does not know: it dials a private UNIX socket, and this process relays.

The law: the socket is in a folder that only this user can enter, and goes with it. Where the relay broke, it is the
relay that says why; what QEMU says then only follows from that. Where the guest has moved, nothing is broken off: the
far side sees the stream end.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from corefw.cli.interrupts import Interrupts
from corefw.cli.routes import find_transport
from corefw.relay import Relay
from corefw.states import MigrationStatus

_SETTLE: Final = 2.0
"""Seconds for the relay to find out why it broke, when QEMU was quicker to see that it did."""

_FAREWELL: Final = 10.0
"""Seconds for the relay to end by itself when the guest has moved: as long as QEMU needs to close its socket."""

_LOOK: Final = 0.1


class QemuRelay:
    """`with QemuRelay(uri) as relay:`, and tell the QEMU to migrate to `relay.uri`. Raises UriError, ChannelError."""

    def __init__(self, uri: str) -> None:
        target = find_transport(uri)
        self._far = uri
        self._folder = Path(tempfile.mkdtemp(prefix="migfw-relay-"))
        try:
            self.uri: Final = f"unix:{self._folder}/qemu"
            self._relay = Relay(find_transport(self.uri), target)
            self._given_up = False
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

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
                return "interrupted before all that QEMU had sent was passed on"
        return f"QEMU had sent all of it, but {self._failure()}" if self._relay.failure else None

    def _failure(self) -> str:
        """Why the relay broke, with its two sides called by what they are here."""
        sides = {
            "the FROM side of the relay": "the QEMU's side",
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
        shutil.rmtree(self._folder, ignore_errors=True)
