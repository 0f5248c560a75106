"""The page faults of a machine that does not run: there are none."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from corefw.machine import FaultSource, RamBlock


class NoFaults(FaultSource):
    """A machine that accesses none of its RAM while it arrives."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # never readable

    @property
    def is_open(self) -> bool:
        """Whether RAM is still to arrive."""
        return self._fd >= 0

    def fileno(self) -> int:
        return self._fd

    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        return {}

    def install(self, block: RamBlock, runs: NDArray[np.int64]) -> None:
        """Nothing waits for it."""

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
