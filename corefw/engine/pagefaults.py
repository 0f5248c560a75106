"""Serves the page faults of a guest that runs while its RAM is still arriving.

Pages that have arrived are installed at once; the others are requested from the source, again after the connection
broke. Source: QEMU 10.0, postcopy_ram_fault_thread (migration/postcopy-ram.c).
"""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.channel import Interrupt
from corefw.engine.returnpath import ReturnPathWriter
from corefw.engine.scheduling import answer_at_once
from corefw.errors import ANYTHING, ChannelError, Interrupted, StreamError
from corefw.machine import FaultSource, RamBlock
from corefw.memory.runs import distinct
from corefw.postcopy import OnDemandLoader
from corefw.wire.returnpath import PageRequest

log = logging.getLogger(__name__)

MOST: Final = 1 << 30
"""Bytes of one request: its length has 32 bits."""
RETRY: Final = 1.0
"""Seconds until a fault that could not be served is tried again."""


class PageFaults:
    """The thread that serves the faults. Every method may be called from any thread."""

    def __init__(self, source: FaultSource, loaders: Iterable[OnDemandLoader], blocks: Iterable[RamBlock]) -> None:
        self._source = source
        self._loaders = {block: loader for loader in loaders for block in loader.covers().ram_blocks}
        self._page_sizes = {block.idstr: block.page_size for block in blocks}
        self._path: ReturnPathWriter | None = None
        self._interrupt = Interrupt()
        self._thread = threading.Thread(target=self._run, name="page faults", daemon=True)
        self._thread.start()

    def request_over(self, path: ReturnPathWriter | None) -> None:
        """Request pages over this return path from now on, first those that the guest waits for already; None: the
        connection broke. Never raises: a path that breaks is replaced."""
        self._path = path
        if path is not None:
            for block, loader in self._loaders.items():
                self._request(block, loader.outstanding(block))

    def guest_waits(self) -> bool:
        """Whether a thread of the guest waits for a page that has not arrived."""
        return any(len(loader.outstanding(block)) for block, loader in self._loaders.items())

    def check_complete(self) -> None:
        """Raise StreamError if a page has not arrived."""
        for block, loader in self._loaders.items():
            if missing := int(np.count_nonzero(~loader.received(block))):
                raise StreamError(f"expected all pages of RAM block '{block}', got the end without {missing} of them")

    def release(self) -> None:
        """Let the guest see all of its RAM, and end. Idempotent; does not raise."""
        self._stop()
        self._source.release()

    def close(self) -> None:
        """End, and leave the guest waiting for what has not arrived. Idempotent; does not raise."""
        self._stop()
        self._source.close()

    def _stop(self) -> None:
        self._interrupt.set()
        self._thread.join()
        self._loaders = {}

    def _run(self) -> None:
        answer_at_once()
        waiting: dict[str, NDArray[np.int64]] = {}
        while True:
            try:
                self._interrupt.wait_for(self._source.fileno(), select.POLLIN, RETRY if waiting else None)
                self._add_new(waiting)
            except Interrupted:
                return
            except ANYTHING:
                log.exception("the page faults of the guest could not be read")
                if self._interrupt.wait(RETRY):
                    return
            for block, pages in list(waiting.items()):
                left = self._serve(block, pages)
                waiting.pop(block)
                if len(left):
                    waiting[block] = left

    def _add_new(self, waiting: dict[str, NDArray[np.int64]]) -> None:
        """Add the pages that threads of the guest have begun to wait for."""
        for block, found in self._source.poll().items():
            pages = found[:, 0] if block not in waiting else np.concatenate([waiting[block], found[:, 0]])
            waiting[block] = distinct(pages)

    def _serve(self, block: str, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Install or request these pages. Returns those where that failed, which is to be tried again: a page that
        cannot be installed keeps none of the others waiting."""
        try:
            self._request(block, self._loaders[block].wait_for(block, pages))
        except ANYTHING:
            if len(pages) > 1:
                return np.concatenate([self._serve(block, page) for page in np.split(pages, len(pages))])
            log.exception("a page fault of the guest could not be served, and is tried again: page %d", pages[0])
            return pages
        return pages[:0]

    def _request(self, block: str, runs: NDArray[np.int64]) -> None:
        path, size = self._path, self._page_sizes[block]
        if path is None:
            return
        try:
            for first, end in runs.tolist():
                for at in range(first * size, end * size, MOST):
                    path.request_pages(PageRequest(at, min(MOST, end * size - at), block))
        except ChannelError as error:
            log.debug("pages of block '%s' could not be requested: %s", block, error)
