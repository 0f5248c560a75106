"""Allocates the RAM of a waiting destination in the background.

Receiving a guest takes more time for allocating memory than for copying, up to 2 s per GiB if the host is itself a
virtual machine. So a process with idle priority (populate.py) allocates it while a destination waits. It is ended when
a source connects; the rest is allocated on arrival.

Invariant: contents do not change, and no destination fails because of it. At most half of the memory that the host, or
its cgroup, can spare is allocated. Zero pages that arrive give whole huge pages back (MemfdBlock.fill).

Threads: any; one call at a time, except progress().
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from corefw.machine import RamBlock

log = logging.getLogger(__name__)

WORTHWHILE: Final = 64 << 20
"""Bytes of RAM from which a process is worth starting."""
BLOCK: Final = 512
"""Bytes in the unit of st_blocks."""


def allocated_bytes(blocks: Sequence[RamBlock]) -> int:
    """Allocated bytes of these blocks."""
    return sum(min(block.length, os.fstat(block.fd).st_blocks * BLOCK) for block in blocks)


class Preallocation:
    """Preallocation of the blocks of one destination, for one migration."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = tuple(blocks)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to allocate pages that were never touched. Call it before anything is loaded. Does not raise."""
        holes = [block.holes() for block in self._blocks]
        parts = [runs * block.page_size for block, runs in zip(self._blocks, holes, strict=True)]
        if sum(int((part[:, 1] - part[:, 0]).sum()) for part in parts) < WORTHWHILE:
            return
        files = [[block.fd, part.tolist()] for block, part in zip(self._blocks, parts, strict=True)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "corefw.memory.populate"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[block.fd for block in self._blocks],
                start_new_session=True,  # Ctrl-C is for the engine
            )
        except OSError as error:
            log.info("no memory is allocated in advance: %s", error)
            return
        for block, runs in zip(self._blocks, holes, strict=True):
            block.known_zero = runs
        self._process = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(json.dumps(files).encode() + b"\n")
            process.stdin.flush()

    def stop(self) -> None:
        """End the process and wait for that; allocated memory stays. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        # With idle priority it might not even be scheduled to end for a while.
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))
        process.kill()
        with process:  # closes its input and waits
            pass

    def close(self) -> None:
        """End the process, and forget which memory is known to be zero. Idempotent; does not raise."""
        self.stop()
        for block in self._blocks:
            block.known_zero = None

    def progress(self) -> tuple[int, int, bool]:
        """(Bytes of RAM that are allocated, total bytes, whether the process still allocates more)."""
        process = self._process
        allocated = 0
        with contextlib.suppress(OSError):  # a block was closed
            allocated = allocated_bytes(self._blocks)
        total = sum(block.length for block in self._blocks)
        return allocated, total, process is not None and process.poll() is None
