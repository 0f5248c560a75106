"""The program that allocates memory for a waiting destination: `python -P -m corefw.memory.populate`.

It reads one line of JSON, a list of [descriptor, [[first, end], ...]] with offsets in bytes, allocates these parts of
the files in their order, and ends. It also ends when its standard input does, and so with the engine.

Why a process of its own: it runs with idle priority, so on a busy host it may be preempted for long in the middle of a
step. A preempted thread of the engine would hold the lock of the engine's memory map, and every allocation there would
wait. If memory runs out, the oom_score_adj of 1000 makes the kernel kill this process and not a guest.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from corefw.memory.host import spare_memory

STEP: Final = 8 << 20
"""Bytes to allocate in one call, which takes some milliseconds if the memory is warm."""
MOST_THREADS: Final = 4
WORST_OOM_SCORE: Final = "1000"

_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14


class Allocator:
    """Hands out steps to threads as long as there is memory to spare."""

    def __init__(self, steps: Iterator[Callable[[], None]], spare: Callable[[], int] = spare_memory) -> None:
        """`spare` returns how many bytes the host can spare. At most half of that is allocated; the rest of the RAM is
        allocated when it arrives, as without this program."""
        self._steps = steps
        self._spare = spare
        self._lock = threading.Lock()
        self._taken = 0

    def run(self) -> None:
        """Carry out steps until there are no more. Several threads call this."""
        while (step := self._next()) is not None:
            step()

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            if self._spare() - STEP < self._taken + STEP:
                return None
            self._taken += STEP
            return next(self._steps, None)


def steps(fd: int, runs: list[tuple[int, int]]) -> Iterator[Callable[[], None]]:
    """Split these parts of a file into steps."""
    mapping = mmap.mmap(fd, 0)
    for first, end in runs:
        for start in range(first, end, STEP):
            yield _step(mapping, start, min(STEP, end - start))


def _step(mapping: mmap.mmap, start: int, length: int) -> Callable[[], None]:
    return lambda: mapping.madvise(_MADV_POPULATE_WRITE, start, length)


def _work(allocator: Allocator) -> None:
    with contextlib.suppress(OSError):  # an older kernel, or no more memory: the rest is allocated when it arrives
        allocator.run()


def main() -> None:
    files = json.loads(sys.stdin.buffer.readline() or b"[]")  # before it becomes idle: the engine waits for a long line
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        Path("/proc/self/oom_score_adj").write_text(WORST_OOM_SCORE)
    allocator = Allocator(step for fd, runs in files for step in steps(fd, runs))
    count = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    threads = [threading.Thread(target=_work, args=(allocator,), daemon=True) for _ in range(count)]
    threading.Thread(target=_end_with_input, daemon=True).start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)  # not held up by the thread that reads


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
