"""What else dials in while a stream is loaded.

The channel of requested pages is passed on. A source with the capability multifd sends its pages over channels of its
own. Nothing here reads them, so the load has to fail and name the capability. All other connections are closed.

Threads: one of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from corefw.channel import Channel, Interrupt, Listener
from corefw.errors import FOREIGN, MigfwError, StreamError
from corefw.wire.constants import BE32, MULTIFD_MAGIC

log = logging.getLogger(__name__)

FIRST_WORDS: Final = 1.0
"""Seconds that a connection has to send four bytes: a channel of multifd begins with its magic number."""


class StrayChannels:
    """Watches a listener until `stop()`.

    Threads: both functions are called from its own, `take` with each channel (it returns whether it has taken that),
    `on_multifd` once.
    """

    def __init__(self, listener: Listener, take: Callable[[Channel], bool], on_multifd: Callable[[], None]) -> None:
        self._listener = listener
        self._take = take
        self._on_multifd = on_multifd
        self._interrupt = Interrupt()
        self._multifd = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stray channels", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StreamError if a channel of multifd came."""
        if self._multifd.is_set():
            raise StreamError(
                "expected all pages in one stream, got a channel of multifd (switch capability 'multifd' off on the"
                " source)"
            )

    def stop(self) -> None:
        """Accept nothing more. The listener stays open. Idempotent; does not raise."""
        self._interrupt.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                channel = self._listener.accept(self._interrupt)
                if self._take(channel):
                    continue
                with channel:
                    if not self._multifd.is_set() and self._is_multifd(channel):
                        self._multifd.set()
                        self._on_multifd()
        except MigfwError as error:
            log.debug("no longer watching for other connections: %s", error)
        except FOREIGN:  # a transport is a plugin; the stream is loaded all the same
            log.exception("cannot watch for other connections")

    def _is_multifd(self, channel: Channel) -> bool:
        magic = bytearray(BE32.size)
        received = 0
        try:
            while received < len(magic):
                if not channel.wait_readable(FIRST_WORDS):
                    return False
                count = channel.receive_into(memoryview(magic)[received:])
                if not count:
                    return False
                received += count
        except MigfwError as error:
            log.debug("another connection broke: %s", error)
            return False
        return magic == BE32.pack(MULTIFD_MAGIC)
