"""Page requests on the source: the pages that the destination's guest waits for.

Source: QEMU 10.0, migrate_handle_rp_req_pages, migration_make_urgent_request (migration/migration.c).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from corefw.engine.meter import Meter
from corefw.engine.preempt import RequestedSender
from corefw.errors import StreamError
from corefw.postcopy import OnDemandSaver, PreemptSaver
from corefw.wire.returnpath import ReturnMessageRecord, parse_page_request
from corefw.wire.stream import StreamReader


class PageRequests:
    """The requests over one connection: passes each to the saver of its RAM block. If the pages have a channel of their
    own they are sent at once; otherwise nothing is held back by a limit while one is waiting.

    Called with a message in the return path's thread; everything else is the migration thread's.
    """

    def __init__(self, savers: Sequence[OnDemandSaver], meter: Meter, sender: RequestedSender | None) -> None:
        self._savers = {block: saver for saver in savers for block in saver.covers().ram_blocks}
        self._meter = meter
        self._sender = sender
        self._block = ""  # a request without a name is for the block of the one before
        self._lock = threading.Lock()
        self._waiting = 0

    def __call__(self, record: ReturnMessageRecord, reader: StreamReader) -> None:
        """REQ_PAGES or REQ_PAGES_ID, and those that follow, if they can be answered at once. Raises StreamError for
        anything but whole pages of a RAM block, ChannelError."""
        request = parse_page_request(record)
        block = self._block if request.block is None else request.block
        if block not in self._savers:
            raise StreamError(f"page request: expected one of the RAM blocks {', '.join(self._savers)}, got '{block}'")
        self._block = block
        saver = self._savers[block]
        if self._sender is not None and isinstance(saver, PreemptSaver):
            self._sender.send(saver, block, request.start, request.length)
            self._block = self._sender.serve(saver, reader, block)
            return
        saver.request_pages(block, request.start, request.length)
        with self._lock:
            self._waiting += 1
        self._meter.urgent_begins()

    @contextmanager
    def served(self) -> Iterator[None]:
        """Around one turn of every saver, in which all the requests that have come before are served."""
        with self._lock:
            waiting = self._waiting
        yield
        self._end(waiting)

    def forget(self) -> None:
        """The connection broke, and the destination will ask again over the next one."""
        self._end(self._waiting)

    def _end(self, count: int) -> None:
        with self._lock:
            self._waiting -= count
        for _ in range(count):
            self._meter.urgent_ends()
