"""SWITCHOVER_ACK: the destination tells a source with the capability `switchover-ack` that it may switch over.

Source: QEMU 10.0, loadvm_process_command and migration_can_switchover; what QEMU 11.1 changed is in wire/versions.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from corefw.engine.returnpath import ReturnPathWriter
from corefw.wire.constants import ReturnMessage

log = logging.getLogger(__name__)

STALLED_PARTS: Final = 3000
STALLED_SECONDS: Final = 30.0
"""So many PARTs in so short a time: each is a whole pass, and the source does not switch over. QEMU 10.0 sends 1300 a
second while it waits for SWITCHOVER_ACK."""
SETTLED: Final = 1.0
"""But not in less than this: with dirty bitmaps a QEMU sends pass after pass until it has measured the bandwidth, for
a tenth of a second."""


class AckPolicy(Enum):
    """When the destination sends SWITCHOVER_ACK."""

    NEVER = auto()
    AT_ONCE = auto()
    """As soon as there is a return path."""
    IF_AWAITED = auto()
    """Once the source evidently waits for it. It may not understand the message; but a capability that only the source
    has switched on must not make the migration wait for ever."""


class SwitchoverAck:
    """The destination's side of one migration, from the moment when the return path opens."""

    def __init__(self, path: ReturnPathWriter, policy: AckPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ChannelError."""
        self._path = path
        self._clock = clock
        self._pending = policy is AckPolicy.IF_AWAITED
        self._parts = 0
        self._since = clock()
        if policy is AckPolicy.AT_ONCE:
            self._send()

    def part_loaded(self) -> None:
        """Count a PART. Raises ChannelError."""
        if not self._pending:
            return
        if not self._parts:
            self._since = self._clock()
        self._parts += 1
        if self._parts < STALLED_PARTS:
            return
        waited = self._clock() - self._since
        if waited < SETTLED:
            return
        if waited < STALLED_SECONDS:
            log.warning(
                "the source sends pass after pass and does not switch over: it seems to have the capability"
                " 'switchover-ack', so it gets SWITCHOVER_ACK"
            )
            self._send()
        self._parts = 0

    def _send(self) -> None:
        self._pending = False
        self._path.send(ReturnMessage.SWITCHOVER_ACK)
