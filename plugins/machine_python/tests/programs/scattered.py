"""A guest that writes all over its memory, so that dirty pages are rarely adjacent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import numpy as np
from corefw_machine_python import guest

PAGES: Final = 16384


class Scattered(guest.Program):
    """Increments counters in random pages. Their sum is `writes`, so a lost page shows."""

    counters = guest.array("counters", shape=(PAGES, 512), dtype="uint64")
    writes = guest.field("u64")
    state = guest.field("u64")

    def setup(self) -> None:
        self.state = 12345

    def tick(self) -> None:
        rng = np.random.default_rng(self.state)
        pages = np.unique(rng.integers(0, PAGES, 100))
        self.counters[pages, rng.integers(0, 512)] += np.uint64(1)
        self.writes += len(pages)
        self.state += 1
        time.sleep(0.0005)

    def verify(self) -> Mapping[str, object]:
        found = int(self.counters.sum())
        if found != self.writes:
            raise AssertionError(f"{self.writes} writes were counted, {found} are found")
        return {"writes": self.writes}
