"""Allocates pages ahead of the receiver, in a thread of its own.

The law: it changes nothing that anybody can read. Where data has come without a gap for a while, the pages that follow
are allocated a little before they are written, which takes half of the work of a first write off the receiving thread
(measured with one block: 0.17 instead of 0.37 s a GiB). Where zero pages come in between it stays away, so a guest that
is mostly empty stays so here.

Threads: `wrote` and `close` from the incoming thread; the kernel's lock on a block is held for one step at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from corefw.errors import MachineError
from corefw.machine import PreallocatesPages, RamBlock

log = logging.getLogger(__name__)

SOLID: Final = 8192
"""Pages (32 MiB) that came without a gap before anything is allocated: so at most a third is in vain."""
AHEAD: Final = 4096
"""Pages (16 MiB) that it runs ahead."""
STEP: Final = 256
"""Pages allocated at once."""


class Forerunner:
    """For one migration. The thread starts when there is something to do."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._block: RamBlock | None = None
        self._preallocate: Callable[[int, int], None]
        self._expected = 0  # the page that would go on without a gap
        self._solid = 0
        self._target = 0
        self._allocated = 0

    def wrote(self, block: RamBlock, first: int, end: int, *, solid: bool) -> None:
        """Pages from `first` to `end` of the block were written: all of them, or (not `solid`) some."""
        if block is not self._block or first != self._expected or not solid:
            self._solid = 0
        self._solid += end - first
        self._expected = end
        with self._changed:
            if block is not self._block:
                self._block, self._target, self._allocated = block, 0, 0
            target = min(end + AHEAD, block.length // block.page_size)
            if self._solid < SOLID or target - self._target < STEP or not isinstance(block, PreallocatesPages):
                return
            self._allocated = max(self._allocated, end)
            self._target = target
            self._preallocate = block.preallocate
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="allocate ahead", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._allocated < self._target)
                if self._closed:
                    return
                preallocate = self._preallocate
                first, end = self._allocated, min(self._allocated + STEP, self._target)
                self._allocated = end
            try:
                preallocate(first, end)
            except MachineError as error:  # the writer will meet the same, and say so
                log.debug("cannot allocate ahead: %s", error)
                return
