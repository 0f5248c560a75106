"""A dirty log that compares hashes of pages, for hosts without PAGEMAP_SCAN.

Invariant: a page that differs from what was sent is reported. Pages that were never touched count as zero and are not
read, because that would allocate them.

The source has to report what it sent with sent(). Otherwise the log compares with the last harvest, and misses a page
that was changed, sent, and changed back between two harvests.

It takes 16 bytes of memory per page, and about 0.8 s per GiB with SHA instructions, so PagemapLog is preferred.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import ComparingLog, RamBlock
from corefw.memory.runs import mask_of_runs, no_runs, runs_of_mask

CHUNK: Final = 1024
"""Pages to hash before they are compared. Bounds the memory of a harvest."""

_WORDS: Final = 2


class HashLog(ComparingLog):
    """The dirty log of a block that the engine maps. It finds the writes of all processes, including the engine's."""

    def __init__(self, block: RamBlock) -> None:
        self._block = block
        self._known: NDArray[np.uint64] | None = None
        self._zero = self._hashes(memoryview(bytes(block.page_size)))

    def start(self) -> None:
        """See DirtyLog. Reads all touched RAM."""
        self._known = np.repeat(self._zero, len(self._block.pages), axis=0)
        self.harvest()

    def harvest(self) -> NDArray[np.int64]:
        """See DirtyLog. Reads all of the RAM that was touched, releasing the interpreter lock for each page."""
        return self.harvest_within(np.array([[0, len(self._block.pages)]]))

    def harvest_within(self, runs: NDArray[np.int64]) -> NDArray[np.int64]:
        """See DirtyLog. Reads those of these pages that were touched."""
        if self._known is None:
            return no_runs()
        hole = mask_of_runs(self._block.holes(), len(self._known))
        wanted = mask_of_runs(runs, len(self._known))
        dirty = hole & (self._known != self._zero).any(axis=1)
        self._known[hole] = self._zero
        for first, end in runs_of_mask(wanted & ~hole).tolist():
            self._compare(self._known, dirty, first, end)
        return runs_of_mask(dirty)

    def _compare(self, known: NDArray[np.uint64], dirty: NDArray[np.bool_], first: int, end: int) -> None:
        size = self._block.page_size
        for at in range(first, end, CHUNK):
            until = min(at + CHUNK, end)
            hashes = self._hashes(self._block.view[at * size : until * size])
            dirty[at:until] = (hashes != known[at:until]).any(axis=1)
            known[at:until] = hashes

    def _hashes(self, data: memoryview) -> NDArray[np.uint64]:
        """16 bytes of SHA-256 for each page: the fastest hash in the standard library if the processor has instructions
        for it, and long enough that two pages never have the same."""
        size = self._block.page_size
        digests = [hashlib.sha256(data[at : at + size]).digest()[: 8 * _WORDS] for at in range(0, len(data), size)]
        return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, _WORDS)

    def sent(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """See ComparingLog. A page that the guest changed while it was being copied stays dirty, as it has to."""
        if self._known is not None:
            self._known[pages] = self._hashes(np.ascontiguousarray(data).reshape(-1).data)

    def stop(self) -> None:
        self._known = None
