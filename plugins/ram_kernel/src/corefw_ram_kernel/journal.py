"""What happens to a guest's page faults, as compiled code notes it: see journal.c."""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw_ram_kernel.library import QUICK

ENTRIES: Final = 4096

_u64 = ctypes.c_uint64


class _Journal(ctypes.Structure):
    """`struct journal` in journal.h, with the five words of each entry."""

    _fields_ = (("first", _u64), ("end", _u64), ("locked", _u64), ("entries", _u64 * 5 * ENTRIES))


_read: Final = QUICK.corefw_read_journal
_read.argtypes = (ctypes.POINTER(_Journal), _u64, _u64)
_read.restype = _u64


class FaultJournal:
    """A journal. Threads: any."""

    def __init__(self) -> None:
        self._journal = _Journal()

    @property
    def address(self) -> int:
        return ctypes.addressof(self._journal)

    def take(self) -> NDArray[np.int64]:
        """What has happened since the last call, in order: rows (nanoseconds of CLOCK_MONOTONIC, what, number of the
        block, page, thread). `what` is 0 for a thread that has begun to wait, 1 for a page that was installed and that
        the guest had waited for, 2 for one that had arrived before it did. The thread's id is there with 0 only."""
        if self._journal.first == self._journal.end:  # mostly
            return np.empty((0, 5), dtype=np.int64)
        entries = np.empty((ENTRIES, 5), dtype=np.int64)
        return entries[: _read(self._journal, entries.ctypes.data, len(entries))]
