"""SWITCHOVER_ACK: the destination tells a source with the capability `switchover-ack` that it may switch over.

Source: loadvm_process_command and migration_can_switchover, QEMU 10.0; what QEMU 11.1 changed is in wire/versions.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from corefw.engine.returnpath import ReturnPathWriter
from corefw.wire.constants import ReturnMessage
from corefw.wire.versions import SWITCHOVER_ACK, UNASKED_ACK, machine_version

log = logging.getLogger(__name__)

STALLED_PARTS: Final = 3000
STALLED_SECONDS: Final = 30.0
"""So many PARTs in so short a time: each is a whole pass, and the source does not switch over. QEMU 10.0 that waits for
SWITCHOVER_ACK sends 1300 a second."""


class SwitchoverAck:
    """The destination's side of one migration.

    No device here has a say in it, so the message goes out as soon as there is a return path, if the source is sure to
    understand it. If that is not sure, it goes out once the source evidently waits for it: a capability that only the
    source has switched on must not make a migration wait for ever.
    """

    def __init__(self, *, enabled: bool, parks: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`enabled`: the capability is on here; `parks`: the source is a QEMU, whose machine type names a version."""
        self._enabled = enabled
        self._parks = parks
        self._clock = clock
        self._return_path: ReturnPathWriter | None = None
        self._pending = False
        self._parts = 0
        self._since = clock()

    def return_path_opened(self, path: ReturnPathWriter, machine_type: str) -> None:
        """Raises ChannelError."""
        self._return_path = path
        version = machine_version(machine_type)
        if not self._parks:
            if self._enabled:
                self._send()
        elif version is None or UNASKED_ACK.holds(version):
            self._pending = True
            if version is not None and (self._enabled or SWITCHOVER_ACK.holds(version)):
                self._send()

    def part_loaded(self) -> None:
        """A PART came. Raises ChannelError."""
        if not self._pending:
            return
        if not self._parts:
            self._since = self._clock()
        self._parts += 1
        if self._parts < STALLED_PARTS:
            return
        if self._clock() - self._since < STALLED_SECONDS:
            log.warning(
                "the source sends pass after pass and does not switch over: it seems to have the capability"
                " 'switchover-ack', so it gets SWITCHOVER_ACK"
            )
            self._send()
        self._parts = 0

    def _send(self) -> None:
        assert self._return_path is not None
        self._pending = False
        self._return_path.send(ReturnMessage.SWITCHOVER_ACK)
