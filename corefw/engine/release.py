"""Gives the source's memory back while postcopy sends it (capability release-ram).

A page may be given back only if the destination has it: its guest runs there, and the source has the only other copy.
So the source sends a PING behind every STEP bytes, and what came before is given back with its PONG, which comes when
the destination has loaded that. A migfw answers these PINGs only once its guest has started: before that it
may still refuse the guest, which then goes on at the source and needs its memory.

Requested pages with a channel of their own are given back at the end, since no PING follows them there.

Threads: the migration thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from corefw.engine.source import Source
from corefw.errors import MachineError
from corefw.postcopy import ReleasingSaver
from corefw.wire.constants import ReturnMessage

log = logging.getLogger(__name__)

STEP: Final = 4 << 20
"""Bytes between two PINGs, at least."""

FIRST_PING: Final = 16
"""Their numbers count from here on. Those of the switchover are lower."""


class MemoryRelease:
    """For one connection."""

    def __init__(self, source: Source) -> None:
        self._source = source
        wanted = source.settings.capability("release-ram")
        self._savers = [saver for saver in source.later() if wanted and isinstance(saver, ReleasingSaver)]
        self._number = FIRST_PING
        self._asked = False
        self._sent = source.meter.total

    def step(self) -> None:
        """Between two PARTs: give back what has arrived, and ask about what was sent since."""
        link, sent = self._source.link, self._source.meter.total
        if self._asked and link.answers.has(ReturnMessage.PONG, self._number):
            self._give_back(lambda saver: saver.release())
            self._asked, self._number = False, self._number + 1
        if self._savers and not self._asked and sent - self._sent >= STEP:
            for saver in self._savers:
                saver.mark()
            link.ping(self._number)
            self._asked, self._sent = True, sent

    def finish(self) -> None:
        """The destination has the whole guest."""
        self._give_back(lambda saver: saver.release_all())

    def _give_back(self, release: Callable[[ReleasingSaver], None]) -> None:
        for saver in self._savers:
            self._source.released = True
            try:
                release(saver)
            except MachineError as error:  # the migration does not need it
                log.warning("%s", error)
