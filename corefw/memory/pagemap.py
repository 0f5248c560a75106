"""The dirty log by PAGEMAP_SCAN and asynchronous write-protection (Linux 6.7), of this process's memory or another's.

Invariant: the kernel remembers the writes. A page of a registered range is write-protected by a mark in the page table;
the first write clears the mark, and nothing waits; one ioctl finds the pages without the mark and sets it again, page
by page under the page table's lock, so a write is in this harvest or in the next.

The process that is watched calls open_tracker() and passes the two descriptors on. A process that holds them can watch
it, and needs no other permission. A guest that is not being migrated pays nothing: start() registers its memory, stop()
unregisters it.

Source: Documentation/admin-guide/mm/pagemap.rst, include/uapi/linux/fs.h. What a harvest costs: docs/performance.md.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from dataclasses import dataclass
from struct import Struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MachineError
from corefw.machine import DirtyLog
from corefw.memory import userfault
from corefw.memory.runs import Runs, join, no_runs

log = logging.getLogger(__name__)

_PAGEMAP_SCAN: Final = 0xC0606610
_WP_MATCHING: Final = 1
_CHECK_WPASYNC: Final = 2
_PAGE_IS_WRITTEN: Final = 2

# struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
# category_anyof_mask, return_mask
_ScanArgument: Final = Struct("=12Q")
_WALK_END: Final = 4

REGIONS: Final = 512
"""Regions that one call can report: as many as the kernel gathers before it copies them out. If asked for more, it
continues, but may report that it stopped where it last copied although it reached the end (seen on Linux 6.18).
Continuing from there would find some pages twice, out of order."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """The descriptors that another process needs to watch this one's memory. The receiver closes them.

    userfaultfd   of the watched process
    pagemap       its /proc/PID/pagemap, opened by that process itself: no permission is needed, and a pid that was
                  reused does no harm
    """

    userfaultfd: int
    pagemap: int

    def close(self) -> None:
        os.close(self.userfaultfd)
        os.close(self.pagemap)


def open_tracker() -> Tracker:
    """Make this process's memory watchable. Raises OSError if the kernel does not support it: see unsupported()."""
    features = userfault.Feature.WP_ASYNC | userfault.Feature.WP_UNPOPULATED | userfault.Feature.WP_HUGETLBFS_SHMEM
    userfaultfd = userfault.create(features)
    try:
        return Tracker(userfaultfd, os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        os.close(userfaultfd)
        raise


def unsupported() -> str | None:
    """Why PagemapLog does not work for this process on this host, or None if it does. Tries it on one page."""
    try:
        tracker = open_tracker()
    except OSError as error:
        return f"no userfaultfd with asynchronous write-protection ({error.strerror})"
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(page, dtype=np.uint8)
    watch = PagemapLog(tracker, array.ctypes.data, len(array), len(array))
    try:
        watch.start()
        found = watch.harvest()
        array[0] = 1
        return None if len(found) == 0 and len(watch.harvest()) == 1 else "PAGEMAP_SCAN does not see a write"
    except MachineError as error:
        return str(error)
    finally:
        watch.stop()
        tracker.close()


def _scan(pagemap: int, regions: NDArray[np.uint64], start: int, end: int, flags: int) -> tuple[int, int]:
    """Do one PAGEMAP_SCAN; return the number of regions, and where it stopped if the buffer was full."""
    fields = [0] * 12
    fields[:8] = [_ScanArgument.size, flags, start, end, 0, regions.ctypes.data, len(regions), 0]
    fields[9] = fields[11] = _PAGE_IS_WRITTEN
    argument = bytearray(_ScanArgument.pack(*fields))
    try:
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument, True)
    except OSError as error:
        raise MachineError(f"cannot read the guest's dirty log by PAGEMAP_SCAN: {error.strerror}") from None
    stopped = int(_ScanArgument.unpack(argument)[_WALK_END]) if count == len(regions) else end
    if not start < stopped <= end:
        raise MachineError(f"PAGEMAP_SCAN stopped at {stopped:#x}, expected {start:#x} to {end:#x}")
    return count, stopped


def written_bytes(pagemap: int, address: int, length: int) -> int:
    """Bytes of this process's memory that the dirty log shows as written, without a harvest. Raises MachineError."""
    regions = np.empty((REGIONS, 3), dtype=np.uint64)
    found, at = 0, address
    while at < address + length:
        count, at = _scan(pagemap, regions, at, address + length, 0)
        found += int((regions[:count, 1] - regions[:count, 0]).sum())
    return found


class PagemapLog(DirtyLog):
    """The dirty log of the mapping at `address` (of `length` bytes) in the memory that `tracker` watches.

    It sees every write through that mapping, also by the kernel (read(2) into an array), and none through other
    mappings. Does not own the tracker, which several logs share.
    """

    def __init__(self, tracker: Tracker, address: int, length: int, page_size: int = 4096) -> None:
        self._tracker = tracker
        self._address = address
        # The host's last page may extend beyond the block; it is mapped nevertheless.
        self._length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        self._page_size = page_size
        self._page_count = length // page_size
        self._regions = np.empty((0, 3), dtype=np.uint64)
        self._armed = False

    def start(self) -> None:
        """See DirtyLog. Raises MachineError if the guest has ended or the kernel refuses."""
        try:
            userfault.register(self._tracker.userfaultfd, self._address, self._length, userfault.Mode.WP)
            self._armed = True
            userfault.write_protect(self._tracker.userfaultfd, self._address, self._length)
        except OSError as error:
            self.stop()
            raise MachineError(f"cannot watch the guest's memory with userfaultfd: {error.strerror}") from None
        self._regions = np.empty((REGIONS, 3), dtype=np.uint64)

    def harvest(self) -> NDArray[np.int64]:
        """See DirtyLog. At most 5 ms per GiB when few pages are dirty."""
        return self.harvest_within(np.array([[0, self._page_count]]))

    def harvest_within(self, runs: NDArray[np.int64]) -> NDArray[np.int64]:
        """See DirtyLog."""
        if not self._armed:
            return no_runs()
        found: list[NDArray[np.uint64]] = []
        pages = mmap.PAGESIZE  # the host's may differ from the guest's: round outwards
        for first, last in (runs * self._page_size).tolist():
            at, end = self._address + first // pages * pages, self._address - -last // pages * pages
            while at < end:
                count, at = _scan(self._tracker.pagemap, self._regions, at, end, _WP_MATCHING | _CHECK_WPASYNC)
                found.append(self._regions[:count, :2].copy())
        return self._as_runs(np.concatenate(found)) if found else no_runs()

    def _as_runs(self, regions: NDArray[np.uint64]) -> Runs:
        runs = (regions - np.uint64(self._address)).view(np.int64)
        runs[:, 0] //= self._page_size
        runs[:, 1] += self._page_size - 1
        runs[:, 1] //= self._page_size
        return join(np.minimum(runs, self._page_count))

    def stop(self) -> None:
        if not self._armed:
            return
        self._armed = False
        self._regions = np.empty((0, 3), dtype=np.uint64)
        try:
            userfault.unregister(self._tracker.userfaultfd, self._address, self._length)
        except OSError as error:  # the guest has gone, and its memory with it
            log.debug("cannot release the guest's memory: %s", error)
