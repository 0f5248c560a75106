"""Serves the page faults of a guest that runs while its RAM is still arriving.

Pages that have arrived are installed at once; the others are requested from the source, again after the connection
broke. Source: QEMU 10.0, postcopy_ram_fault_thread (migration/postcopy-ram.c).
"""

from __future__ import annotations

import contextlib
import logging
import select
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.channel import Interrupt
from corefw.engine.returnpath import ReturnPathWriter
from corefw.engine.standby import StandbyThread
from corefw.errors import ANYTHING, ChannelError, Interrupted, StreamError
from corefw.machine import FaultSource, RamBlock
from corefw.memory.runs import distinct
from corefw.postcopy import FaultServer, OnDemandLoader, ServedFaults
from corefw.wire.returnpath import PageRequest

log = logging.getLogger(__name__)

MOST: Final = 1 << 30
"""Bytes of one request: its length has 32 bits."""
RETRY: Final = 1.0
"""Seconds until a fault that could not be served is tried again."""


class PageFaults:
    """The thread that serves the faults. Every method may be called from any thread."""

    def __init__(self, source: FaultSource, loaders: Iterable[OnDemandLoader], blocks: Iterable[RamBlock]) -> None:
        """Raises ChannelError if the process has no descriptor left: the guest can still run on the source."""
        self._source = source
        self._loaders = {block: loader for loader in loaders for block in loader.covers().ram_blocks}
        self._page_sizes = {block.idstr: block.page_size for block in blocks}
        self._server: FaultServer | None = None
        self._path: ReturnPathWriter | None = None
        self._broken: ReturnPathWriter | None = None
        self._stopping = False
        # Set when `_path` or `_stopping` has changed, or another thread wants to send over the path.
        self._changed = Interrupt()
        self._changed.fileno()  # raises now, and not when a fault is to be served
        self._thread: StandbyThread | None = None

    def start(self, path: ReturnPathWriter | None, thread: StandbyThread) -> None:
        """The loaders listen, and the guest does not run yet: serve faults in this thread, and request pages over this
        return path."""
        loaders = set(self._loaders.values())
        self._server = loaders.pop().fault_server() if len(loaders) == 1 else None
        self._path, self._thread = path, thread
        thread.begin(partial(self._run, path))

    def request_over(self, path: ReturnPathWriter | None) -> None:
        """Request pages over this return path from now on, first those that the guest waits for already; None: the
        connection broke. Does not wait, and never raises: a path that breaks is replaced."""
        self._path = path
        self._changed.set()

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
        self._stopping = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join()
        self._loaders = {}

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self, path: ReturnPathWriter | None) -> None:
        waiting: dict[str, NDArray[np.int64]] = {}
        while True:
            self._changed.clear()  # before looking at what has changed
            if self._stopping:
                return
            try:
                if self._path is not path:
                    path = self._path
                    self._request_outstanding(path)
                for block, pages in self._next(path, RETRY if waiting else None).items():
                    waiting[block] = distinct(np.concatenate([waiting.get(block, pages[:0]), pages]))
            except ANYTHING:
                log.exception("the page faults of the guest could not be read")
                self._changed.wait(RETRY)
            for block, pages in list(waiting.items()):
                left = self._serve(path, block, pages)
                waiting.pop(block)
                if len(left):
                    waiting[block] = left

    def _next(self, path: ReturnPathWriter | None, seconds: float | None) -> Mapping[str, NDArray[np.int64]]:
        """Wait for faults, until `_changed` is set or `seconds` are over. The pages that are still to be served, by
        block; compiled code serves most faults by itself."""
        if self._server is None:
            with contextlib.suppress(Interrupted):
                self._changed.wait_for(self._source.fileno(), select.POLLIN, seconds)
            return {block: found[:, 0] for block, found in self._source.poll().items()}
        return self._serve_compiled(self._server, path, seconds)

    def _serve_compiled(
        self, server: FaultServer, path: ReturnPathWriter | None, seconds: float | None
    ) -> Mapping[str, NDArray[np.int64]]:
        served = ServedFaults(b"", {}, None)

        def serve(descriptor: int | None) -> bytes:
            nonlocal served
            served = server.serve(descriptor, self._changed.fileno(), seconds)
            if served.error is not None:
                raise served.error
            return served.unsent

        if path is None or not path.lends_socket or path is self._broken:
            serve(None)
            return served.missed
        try:
            path.lend_socket(serve, self._changed.set)
        except ChannelError as error:
            self._note_broken(path, error)
        return served.missed

    def _serve(self, path: ReturnPathWriter | None, block: str, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Install or request these pages. Returns those where that failed, which is to be tried again: a page that
        cannot be installed keeps none of the others waiting."""
        try:
            self._request(path, block, self._loaders[block].wait_for(block, pages))
        except ANYTHING:
            if len(pages) > 1:
                return np.concatenate([self._serve(path, block, page) for page in np.split(pages, len(pages))])
            log.exception("a page fault of the guest could not be served, and is tried again: page %d", pages[0])
            return pages
        return pages[:0]

    def _request_outstanding(self, path: ReturnPathWriter | None) -> None:
        for block, loader in self._loaders.items():
            self._request(path, block, loader.outstanding(block))

    def _request(self, path: ReturnPathWriter | None, block: str, runs: NDArray[np.int64]) -> None:
        size = self._page_sizes[block]
        if path is None or path is self._broken:
            return
        try:
            for first, end in runs.tolist():
                for at in range(first * size, end * size, MOST):
                    path.request_pages(PageRequest(at, min(MOST, end * size - at), block))
        except ChannelError as error:
            self._note_broken(path, error)

    def _note_broken(self, path: ReturnPathWriter, error: ChannelError) -> None:
        """Request nothing over this path any more. Another one takes its place, and everything is requested again."""
        log.debug("pages could not be requested: %s", error)
        self._broken = path
