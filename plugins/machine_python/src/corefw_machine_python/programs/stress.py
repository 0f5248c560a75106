"""`stress`: incompressible RAM, writes at a given rate, and counters that reveal a single lost write.

Invariant: the first word of each page of the working set counts the writes to that page, the field `writes` counts all
writes, and every other word has its value from the seed's sequence. So the sum of the counters equals the field,
wherever and however often the program moved.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import UsageError
from corefw_machine_python import guest

PAGE: Final = 4096
WORDS: Final = PAGE // 8
CHUNK: Final = 256
"""Pages per seed: a megabyte, so that filling and checking stay in the processor's cache."""

PERIOD: Final = 0.005
"""Seconds between two bursts of writes."""

WORKING_SET: Final = 64 << 20
"""Default size of the working set in bytes; all of the RAM if that is smaller."""


def _working_set(options: Any) -> int:
    return int(min(WORKING_SET, options.ram) if options.working_set is None else options.working_set)


def _pages(options: Any) -> tuple[int, int]:
    pages = options.ram // PAGE
    if pages < 1:
        raise UsageError(f"option 'ram': {options.ram} bytes are less than a page ({PAGE})")
    if not PAGE <= _working_set(options) <= options.ram:
        raise UsageError(f"option 'working-set': expected from a page ({PAGE} bytes) to all of the RAM ({options.ram})")
    return pages, WORDS


class Stress(guest.Program):
    """Fills its RAM, then keeps writing to a working set."""

    ram_option = guest.option("ram", "512M", kind=guest.size, help="bytes of RAM")
    rate_option = guest.option("dirty-rate", "100M", kind=guest.size, help="bytes of pages dirtied in a second")
    set_option = guest.option("working-set", None, kind=guest.size, help="bytes that are written to (at most 64M)")
    seed_option = guest.option("seed", 1, help="of the sequence that fills the RAM")

    ram = guest.array("ram", shape=_pages, dtype="uint64")
    writes = guest.field("u64")
    cursor = guest.field("u64")
    working_pages = guest.field("u64")
    seed = guest.field("i64")

    def setup(self) -> None:
        self.seed = self.options.seed
        self.working_pages = _working_set(self.options) // PAGE
        for first, words in self._sequence():
            self.ram[first : first + len(words)] = words
        self.ram[: self.working_pages, 0] = 0

    def after_start(self) -> None:
        self._began = time.monotonic()
        self._owed = 0.0

    def tick(self) -> None:
        now = time.monotonic()
        rate = self.options.dirty_rate / PAGE
        # Do not catch up after a pause: the burst would make a long tick.
        self._owed = min(self._owed + rate * (now - self._began), rate, self.working_pages)
        self._began = now
        self._write(int(self._owed))
        self._owed -= int(self._owed)
        time.sleep(max(0.0, PERIOD - (time.monotonic() - now)))

    def _write(self, count: int) -> None:
        """Add one to the next `count` counters, round and round."""
        counters = self.ram[: self.working_pages, 0]
        first = self.cursor
        end = first + count
        counters[first:end] += np.uint64(1)
        counters[: max(0, end - len(counters))] += np.uint64(1)
        self.cursor = end % len(counters)
        self.writes += count

    def verify(self) -> Mapping[str, object]:
        """Raises AssertionError with the number of lost writes, or the first page with wrong contents."""
        found = int(self.ram[: self.working_pages, 0].sum())
        if found != self.writes:
            raise AssertionError(f"{self.writes} writes were counted, but the pages in RAM have seen {found}")
        for first, words in self._sequence():
            here = self.ram[first : first + len(words)]
            same = here[:, 1:] == words[:, 1:]
            if not same.all():
                page = first + int(np.flatnonzero(~same.all(axis=1))[0])
                raise AssertionError(f"page {page} of the RAM is not what the seed {self.seed} put there")
            still = max(0, self.working_pages - first)
            if not np.array_equal(here[still:, 0], words[still:, 0]):
                raise AssertionError(f"a page from {first + still} on, outside the working set, was written to")
        return {"writes": self.writes, "found": found, "pages": len(self.ram)}

    def _sequence(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yield the initial contents of the RAM: (first page, words of the pages from there)."""
        for first in range(0, len(self.ram), CHUNK):
            pages = min(CHUNK, len(self.ram) - first)
            source = np.random.SFC64(np.random.SeedSequence([self.seed & (1 << 64) - 1, first]))
            yield first, source.random_raw(pages * WORDS).reshape(pages, WORDS)
