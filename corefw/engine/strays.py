"""What else dials in while a stream is loaded.

The channel of requested pages is passed on. A source with the capability multifd sends its pages over channels of its
own. Nothing here reads them, so the load has to fail and name the capability. All other connections are closed.

Threads: one of its own, and one for each connection that is examined.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from corefw.channel import Channel, Interrupt, Listener
from corefw.engine.examination import Examination, Examinations
from corefw.engine.identity import Purpose, check_source
from corefw.engine.preempt import RequestedReceiver
from corefw.errors import FOREIGN, MigfwError, StreamError
from corefw.settings import Settings
from corefw.wire.constants import BE32, MULTIFD_MAGIC

log = logging.getLogger(__name__)

FIRST_WORDS: Final = 1.0
"""Seconds that a connection has to send four bytes: a channel of multifd begins with its magic number."""


class StrayChannels:
    """Watches a listener until `stop()`.

    Threads: the functions are called from its own.
    """

    def __init__(
        self,
        settings: Settings,
        listener: Listener,
        requested: RequestedReceiver | None,
        secret: bytes | None,
        on_multifd: Callable[[], None],
    ) -> None:
        """`requested` reads the channel of requested pages, if they have one; the source shows that it is that by the
        secret, if there is one. `on_multifd` is called once."""
        self._listener = listener
        self._requested = requested
        self._secret = secret
        self._on_multifd = on_multifd
        self._interrupt = Interrupt()
        self._multifd = threading.Event()
        self._examinations = Examinations(settings, "stray channel", self._examine)
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
        """Accept nothing more; what is being examined may still be taken. The listener stays open. Idempotent; does not
        raise."""
        self._interrupt.set()
        self._thread.join()

    def close(self) -> None:
        """stop(), and examine nothing more. Idempotent; does not raise."""
        self.stop()
        self._examinations.dismiss()

    def _run(self) -> None:
        try:
            while True:
                channel = self._listener.accept(self._interrupt)
                if self._secret is not None or self._requested is None or not self._requested.offer(channel):
                    self._examinations.begin(channel)
        except MigfwError as error:
            log.debug("no longer watching for other connections: %s", error)
        except FOREIGN:  # a transport is a plugin; the stream is loaded all the same
            log.exception("cannot watch for other connections")

    def _examine(self, examination: Examination) -> None:
        if self._requested is not None and self._secret is not None:
            if check_source(examination.channel, self._secret) is Purpose.REQUESTED:
                examination.keep_for(self._requested.take)
        elif not self._multifd.is_set() and self._is_multifd(examination.channel):
            self._multifd.set()
            self._on_multifd()

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
