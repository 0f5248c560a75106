"""The thread that serves the page faults of a guest whose RAM is still arriving."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from corefw.engine import pagefaults
from corefw.engine.pagefaults import PageFaults
from corefw.engine.standby import StandbyThread
from corefw.errors import MachineError
from corefw.machine import FaultSource, RamBlock
from corefw.testing.tasks import wait_until
from corefw.wire.stream import MemorySource
from tests.helpers.ram import StillMachine, block, receiving

PAGES = 64
BAD = 20


class Faults(FaultSource):
    """Simulated faults. Page BAD cannot be installed while `fails` is set."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._waiting: list[list[int]] = []
        self.installed: set[int] = set()
        self.fails = threading.Event()
        self.attempts = 0

    def touch(self, *pages: int) -> None:
        self._waiting = [[page, 0] for page in pages]
        os.eventfd_write(self._event, 1)

    def fileno(self) -> int:
        return self._event

    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return {}
        return {"ram": np.array(self._waiting, dtype=np.int64)}

    def install(self, block: RamBlock, runs: NDArray[np.int64]) -> None:
        pages = {page for first, end in runs.tolist() for page in range(first, end)}
        if BAD in pages and self.fails.is_set():
            self.attempts += 1
            raise MachineError("cannot map pages of RAM block 'ram': no memory")
        self.installed |= pages

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        if self._event >= 0:
            os.close(self._event)
            self._event = -1


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Faults that are being served, of a guest whose RAM has arrived."""
    monkeypatch.setattr(pagefaults, "RETRY", 0.01)
    source = Faults()
    with StillMachine(block("ram", PAGES)) as machine, receiving(machine, MemorySource(b"")) as receiver:
        receiver.loader.listen(source)
        served = PageFaults(source, [receiver.loader], machine.blocks)
        served.start(None, StandbyThread("page faults"))
        yield source
        served.close()


def test_a_page_that_cannot_be_installed_keeps_no_other_waiting_and_is_tried_again(faults: Faults) -> None:
    faults.fails.set()
    faults.touch(0, BAD, 40)
    assert wait_until(lambda: {0, 40} <= faults.installed)
    assert wait_until(lambda: faults.attempts > 3)
    faults.touch(60)
    assert wait_until(lambda: 60 in faults.installed), "later faults are served meanwhile"
    assert BAD not in faults.installed
    faults.fails.clear()
    assert wait_until(lambda: BAD in faults.installed)
