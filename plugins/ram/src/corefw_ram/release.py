"""The memory that the source can give back in postcopy (capability release-ram): that of pages known to have arrived.

QEMU gives a page back as soon as it was sent, and after a broken connection has zeros to send again. Here the only copy
of a page is never given up: the engine asks the destination from time to time what it has.

Source: QEMU 10.0, ram_release_page, qemu_put_buffer_async. Threads: the migration thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from corefw.errors import StreamError
from corefw.memory.runs import runs_of_mask
from corefw_ram.save import BlockState


class Releasable:
    """Of each block, the pages that were sent, those the destination was asked about, and those given back."""

    def __init__(self, states: Sequence[BlockState]) -> None:
        self._blocks = [state.block for state in states]
        self._sent = [np.zeros(len(state.dirty), dtype=np.bool_) for state in states]
        self._asked = [np.zeros(len(state.dirty), dtype=np.bool_) for state in states]
        self._released = [np.zeros(len(state.dirty), dtype=np.bool_) for state in states]

    def note_sent(self, index: int, pages: NDArray[np.int64]) -> None:
        self._sent[index][pages] = True

    def mark(self) -> None:
        """The destination is asked about everything that was sent."""
        self._sent, self._asked = self._asked, self._sent

    def release(self) -> None:
        """It has that. Raises MachineError."""
        for index, asked in enumerate(self._asked):
            self._release(index, asked)
            asked[:] = False

    def release_all(self) -> None:
        """It has everything. Raises MachineError."""
        for index, released in enumerate(self._released):
            self._release(index, ~released)

    def note_received(self, index: int, received: NDArray[np.bool_]) -> None:
        """After the connection broke: the destination has these pages, and no others. Raises StreamError if it lacks
        one that was given back."""
        lost = int(np.count_nonzero(self._released[index] & ~received))
        if lost:
            raise StreamError(
                f"received bitmap: expected all pages of RAM block '{self._blocks[index].idstr}' that the destination"
                f" had confirmed, got it without {lost} of them"
            )
        self._asked[index][:] = False
        self._sent[index] = received & ~self._released[index]

    def _release(self, index: int, pages: NDArray[np.bool_]) -> None:
        self._blocks[index].release(runs_of_mask(pages))
        self._released[index] |= pages
