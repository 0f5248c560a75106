"""Make the host allocate memory before a measurement uses it.

If this machine is a virtual one, the first touch of memory that was never used, or was given back, costs its host
seconds per GiB, and the first process to touch it would pay for that. So before every measured run a process touches as
much as both sides will use, and ends. It asks for huge pages: a host takes those back first, QEMU's guest RAM is made
of them, and the kernel splits them where small pages are needed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
GIB: Final = 1 << 30

SPARE: Final = 512 * MIB
"""Bytes to leave for everything else on the machine."""

_PROGRAM: Final = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
memory.madvise(23)  # MADV_POPULATE_WRITE, Linux 5.14
"""


def available() -> int:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")


def warm(size: int) -> None:
    """Touch `size` bytes, or as many as are available, and free them."""
    size = min(size, available() - SPARE) // MIB * MIB
    if size > 0:
        subprocess.run([sys.executable, "-c", _PROGRAM, str(size)], check=True)
