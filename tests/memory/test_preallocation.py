"""RAM that is allocated while a destination waits is zero, and no more than the host can spare."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from corefw.memory.blocks import MemfdBlock
from corefw.memory.populate import STEP, Allocator
from corefw.memory.preallocation import WORTHWHILE, Preallocation

MIB = 1 << 20
PATIENCE = 60.0


@pytest.fixture
def block() -> Iterator[MemfdBlock]:
    made = MemfdBlock("ram", WORTHWHILE + 16 * MIB)
    yield made
    made.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


def populating(name: str) -> list[int]:
    """The processes that allocate memory for a block of this name."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"corefw.memory.populate" in command and (process / "environ").read_bytes().find(name.encode()) >= 0:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_all_of_the_ram_is_allocated_and_still_zero(block: MemfdBlock) -> None:
    block.pages[100] = 7
    preallocation = Preallocation([block])
    preallocation.start()
    wait_for(lambda: not preallocation.progress()[2])
    assert preallocation.progress() == (block.length, block.length, False)
    assert block.holes().shape == (0, 2)
    assert (block.pages[100] == 7).all() and not np.delete(block.pages, 100, axis=0).any()
    known = np.concatenate([np.arange(first, end) for first, end in block.zeros().tolist()])
    assert 100 not in known
    assert not block.pages[known].any()
    preallocation.close()
    assert block.zeros().shape == (0, 2)


def test_it_is_stopped_at_once_and_closed_twice(block: MemfdBlock) -> None:
    preallocation = Preallocation([block])
    preallocation.start()
    preallocation.stop()
    allocated, total, running = preallocation.progress()
    assert (total, running) == (block.length, False)
    assert allocated <= total
    preallocation.close()
    preallocation.close()


def test_little_ram_is_not_worth_a_process() -> None:
    block = MemfdBlock("ram", MIB)
    preallocation = Preallocation([block])
    preallocation.start()
    assert preallocation.progress() == (0, MIB, False)
    preallocation.close()
    block.close()


def test_it_ends_with_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREALLOCATION_TEST", mark := f"mark-{os.getpid()}")
    program = (
        "import os; from corefw.memory.blocks import MemfdBlock; from corefw.memory.preallocation import Preallocation;"
        f" block = MemfdBlock('ram', 64 * {WORTHWHILE}); Preallocation([block]).start(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    wait_for(lambda: not populating(mark))


@pytest.mark.parametrize(("spare", "expected"), [(100, 10), (20, 10), (19, 9), (1, 0), (0, 0)])
def test_half_of_what_the_host_can_spare_is_left_to_it(spare: int, expected: int) -> None:
    """The allocation takes ten steps."""
    taken = 0

    def take() -> None:
        nonlocal taken
        taken += 1

    Allocator(iter([take] * 10), lambda: (spare - taken) * STEP).run()
    assert taken == expected
