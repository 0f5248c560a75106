"""The guest of migfw in the postcopy scenarios: it touches its pages in a scattered order, and records touches that
waited.

It does what bench/guest.asm does with STRIDE. The records go into a file; source and destination have one each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from corefw_machine_python import guest

PAGE: Final = 4096
PERIOD: Final = 0.005
"""Seconds between two bursts, as in guest.asm."""
SLOW: Final = 13_000
"""Nanoseconds: longer than any touch that does not wait. guest.asm has it in cycles."""


def _shape(options: Any) -> tuple[int, int]:
    return options.ram // PAGE, PAGE


class Touching(guest.Program):
    """Fills a part of its RAM and keeps touching that part."""

    ram_option = guest.option("ram", "1G", kind=guest.size, help="bytes of RAM")
    filled_option = guest.option("filled", "1G", kind=guest.size, help="bytes that are filled and touched")
    burst_option = guest.option("burst", 8, help="pages touched in a burst, 200 times a second")
    stride_option = guest.option("stride", 1, help="pages from one touch to the next, round and round")
    notes_option = guest.option("notes", "", help="file for pairs of float64: when a slow touch began, and its seconds")

    ram = guest.array("ram", shape=_shape, dtype="uint8")
    touches = guest.field("u64")
    page = guest.field("u64")

    def setup(self) -> None:
        pages = self.options.filled // PAGE
        content = np.random.default_rng(1).integers(0, 256, (256, PAGE), dtype=np.uint8)
        for first in range(0, pages, len(content)):
            part = self.ram[first : min(first + len(content), pages)]
            part[:] = content[: len(part)]
            part[:, 0] = 0

    def tick(self) -> None:
        began = time.monotonic()
        notes: list[float] = []
        pages = self.options.filled // PAGE
        for _ in range(self.options.burst):
            page = self.page
            before = time.monotonic_ns()
            self.ram[page, 0] += 1
            taken = time.monotonic_ns() - before
            if taken >= SLOW:
                notes += (before / 1e9, taken / 1e9)
            self.touches += 1
            self.page = (page + self.options.stride) % pages
        if notes:
            with Path(self.options.notes).open("ab") as file:
                file.write(np.array(notes, dtype=np.float64).tobytes())
        time.sleep(max(0.0, PERIOD - (time.monotonic() - began)))

    def verify(self) -> Mapping[str, object]:
        """Raises AssertionError if a touch was lost. The counters are bytes: modulo 256."""
        found = int(self.ram[: self.options.filled // PAGE, 0].sum(dtype=np.uint64))
        if (found - self.touches) % 256:
            raise AssertionError(f"{self.touches} pages were touched, but those in RAM have seen {found}")
        return {"touches": self.touches}
