"""A guest that leaves evidence: every tick is a line in a file that both hosts can write."""

from __future__ import annotations

import os
import time

from corefw_machine_python import guest

PAGES = 1024
PERIOD = 0.005
"""Seconds between two ticks."""


class Witness(guest.Program):
    """Appends `PROCESS STEP` to its file. A guest that ran twice leaves a step twice."""

    evidence = guest.option("evidence", "", help="the file")

    ram = guest.array("ram", shape=(PAGES, 512), dtype="uint64")
    step = guest.field("u64")

    def setup(self) -> None:
        self.ram[:, 1] = range(1, PAGES + 1)

    def after_start(self) -> None:
        self._file = os.open(self.options.evidence, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def before_stop(self) -> None:
        os.close(self._file)

    def tick(self) -> None:
        os.write(self._file, b"%d %d\n" % (os.getpid(), self.step + 1))
        self.step += 1
        self.ram[self.step * 7 % PAGES, 0] += 1
        time.sleep(PERIOD)

    def verify(self) -> dict[str, object]:
        """Raises AssertionError if a write was lost."""
        if int(self.ram[:, 0].sum()) != self.step:
            raise AssertionError(f"{self.step} steps were made, but the RAM has seen {int(self.ram[:, 0].sum())}")
        if not (self.ram[:, 1] == range(1, PAGES + 1)).all():
            raise AssertionError("the RAM is not what setup() put there")
        return {"step": self.step}
