"""Memory and file descriptors that this host can spare.

Both are estimates, to refuse what cannot fit before anything is allocated. Other processes may take them meanwhile.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

DESCRIPTORS_KEPT: Final = 128
"""Descriptors to leave for the engine itself: QMP clients, channels, log files."""

MEMINFO: Final = Path("/proc/meminfo")
SELF_CGROUP: Final = Path("/proc/self/cgroup")
CGROUPS: Final = Path("/sys/fs/cgroup")


def spare_descriptors() -> int:
    """Descriptors that this process can open without running short itself."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return max(0, soft - used - DESCRIPTORS_KEPT)


def spare_memory() -> int:
    """Bytes that can be allocated without swapping: MemAvailable, or less where a cgroup allows less."""
    return max(0, min((_available(), *_left_in_cgroups())))


def _available() -> int:
    for line in MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    raise AssertionError("Linux since 3.14 has MemAvailable")


def _left_in_cgroups() -> Iterator[int]:
    """What the memory limits of this process's cgroup and of those above it leave (cgroup v2, and v1's flat limit)."""
    for line in SELF_CGROUP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = CGROUPS / "memory" if controllers else CGROUPS
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(top):
                break
            limit, usage = (_number(folder / name) for name in names)
            if limit is not None and usage is not None:
                yield limit - usage + _reclaimable(folder)


def _number(path: Path) -> int | None:
    """The number in the file; None if the file is missing or contains "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(folder: Path) -> int:
    """Page cache that counts as used but can be reclaimed."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("inactive_file", 0))
