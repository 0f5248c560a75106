"""Which pages of a block have arrived while its guest runs, and which it waits for.

A page is missing, claimed by the thread that stores it, or received. Invariant: a claimed page belongs to the thread
that claimed it, until that marks it as received or gives it up. Received is final: the guest may write to the page from
then on.

Compiled code changes the same marks without a lock (block.c); the marks in Python, which are used without it, take one.
Threads: any.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import GuestMapping, RamBlock
from corefw.memory.runs import Runs, runs_of_mask
from corefw_ram.faults import CompiledFaults

MISSING: Final = 0
CLAIMED: Final = 1
RECEIVED: Final = 2


class PageMarks(ABC):
    """The marks of one block. Every array of pages has numbers of pages of the block, in any order."""

    def __init__(self, marks: NDArray[np.uint8]) -> None:
        """`marks`: MISSING or RECEIVED for each page."""
        self._marks = marks
        self._awaited = np.zeros(len(marks), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._marks)

    @abstractmethod
    def claim(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Claim those of these pages that are missing; which ones. A page that is there twice is claimed once."""

    @abstractmethod
    def give_up(self, pages: NDArray[np.int64]) -> None:
        """Pages that the caller has claimed are missing again, but for those that it has received since."""

    @abstractmethod
    def mark_received(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The caller has stored pages that it had claimed. Which of them the guest waits for."""

    @abstractmethod
    def wait_for(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The guest waits for these pages from now on. Which of them have not arrived."""

    def has(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these pages have arrived."""
        received: NDArray[np.bool_] = self._marks[pages] == RECEIVED
        return received

    def received(self) -> NDArray[np.bool_]:
        """A mark for each page that has arrived."""
        received: NDArray[np.bool_] = self._marks == RECEIVED
        return received

    def outstanding(self) -> Runs:
        """What the guest waits for and has not arrived."""
        return runs_of_mask(self._awaited & (self._marks != RECEIVED))


class LockedMarks(PageMarks):
    """Marks behind a lock."""

    def __init__(self, marks: NDArray[np.uint8]) -> None:
        super().__init__(marks)
        self._lock = threading.Lock()

    def claim(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        with self._lock:
            claimed: NDArray[np.bool_] = self._marks[pages] == MISSING
            self._marks[pages[claimed]] = CLAIMED
        return claimed & _first_ones(pages)

    def give_up(self, pages: NDArray[np.int64]) -> None:
        with self._lock:
            self._marks[pages[self._marks[pages] == CLAIMED]] = MISSING

    def mark_received(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        with self._lock:
            self._marks[pages] = RECEIVED
            return self._awaited[pages]

    def wait_for(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        with self._lock:
            self._awaited[pages] = True
            missing: NDArray[np.bool_] = self._marks[pages] != RECEIVED
        return missing


class KernelMarks(PageMarks):
    """Marks that compiled code changes.

    kernel   receives into the block
    """

    def __init__(
        self, marks: NDArray[np.uint8], block: RamBlock, compiled: CompiledFaults, guest: GuestMapping
    ) -> None:
        super().__init__(marks)
        self._ram = block.pages  # stays mapped as long as these marks live
        self.kernel: Final = compiled.receive_into(
            block, guest, ram=self._ram, marks=self._marks, awaited=self._awaited
        )

    def claim(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.kernel.claim(pages)

    def give_up(self, pages: NDArray[np.int64]) -> None:
        self.kernel.give_up(pages)

    def mark_received(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.kernel.mark_received(pages)

    def wait_for(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.kernel.wait_for(pages)


def _first_ones(pages: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of pages that are there more than once, the first."""
    first = np.ones(len(pages), dtype=np.bool_)
    if not (pages[1:] > pages[:-1]).all():
        order = np.argsort(pages, kind="stable")
        first[order[1:]] = pages[order[1:]] != pages[order[:-1]]
    return first
