"""RAM blocks behind memfds, or behind files of huge pages where the host has those.

Invariant: the file is the RAM. The engine's mapping, the guest's mapping and the descriptor lead to the same pages, and
nothing about their contents is cached here. The kernel knows which pages were never touched (SEEK_DATA and SEEK_HOLE),
whether the guest wrote, a channel received into `view`, or store() did. A memfd's size is sealed, so a process with the
descriptor cannot shrink it and make another's access fail. (A file of huge pages cannot be sealed, but only processes
of the same user have it.)

Storing a GiB of small pages that this process has not mapped takes 0.25 to 0.4 s with pwritev, and 0.5 to 0.9 s through
the mapping, where each page takes a fault and the kernel zeroes it first (measured on Linux 6.18). With a system call
per page it takes 1.0 s. Pages that are mapped already take 0.1 s through the mapping, and huge pages 0.1 s either way.
So runs are stored with pwritev, and scattered pages through the mapping.

Threads: store(), fill() and holes() may run in several threads at once on different pages.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from itertools import pairwise
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MachineError
from corefw.machine import DirtyLog, RamBlock
from corefw.memory import hugefile
from corefw.memory.runs import Runs, no_runs, runs_of_pages
from corefw.net import iovec
from corefw.quantities import format_size

PAGES_A_CALL: Final = 4
"""Average pages per run from which a pwritev for each run is faster than the mapping."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class NeverDirty(DirtyLog):
    """The dirty log of a block that no guest writes to, as in a parked machine."""

    def start(self) -> None:
        pass

    def harvest(self) -> NDArray[np.int64]:
        return no_runs()

    def stop(self) -> None:
        pass


class MemfdBlock(RamBlock):
    """A RAM block in a memfd of its own, or a file of huge pages; see RamBlock.

    `dirty_log` may be replaced while no migration runs. Raises MachineError if the host does not have the memory.
    """

    def __init__(self, idstr: str, length: int, page_size: int = 4096, dirty_log: DirtyLog | None = None) -> None:
        if length <= 0 or length % page_size:
            raise ValueError(
                f"RAM block '{idstr}': {length} bytes are not a positive multiple of the page size {page_size}"
            )
        fd = hugefile.create(length)
        self._map(idstr, _make_memfd(idstr, length) if fd is None else fd, length, page_size, dirty_log)

    @classmethod
    def from_fd(cls, idstr: str, fd: int, page_size: int = 4096, dirty_log: DirtyLog | None = None) -> Self:
        """Make a block of an existing memfd. The block owns `fd` when this returns."""
        block = cls.__new__(cls)
        block._map(idstr, fd, os.fstat(fd).st_size, page_size, dirty_log)
        return block

    def _map(self, idstr: str, fd: int, length: int, page_size: int, dirty_log: DirtyLog | None) -> None:
        try:
            self._mapping = mmap.mmap(fd, length)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise _failed(idstr, length, "cannot map", error) from None
        self.idstr = idstr
        self.length = length
        self.page_size = page_size
        self.fd = fd
        self.huge = os.fstat(fd).st_blksize >= hugefile.HUGE
        self.view = memoryview(self._mapping)
        self.pages = np.frombuffer(self._mapping, dtype=np.uint8).reshape(-1, page_size)
        self.dirty_log = dirty_log or NeverDirty()

    def __repr__(self) -> str:
        return f"<MemfdBlock '{self.idstr}' {format_size(self.length)}>"

    @property
    def page_count(self) -> int:
        return self.length // self.page_size

    # -- what was never touched ------------------------------------------------------------------------------------

    def holes(self) -> Runs:
        """See RamBlock. If the guest runs, start its dirty log first, which has the pages that it touches meanwhile."""
        holes: list[tuple[int, int]] = []
        at = 0
        while at < self.length:
            data = self._seek_data(at)
            # Guest and host pages may differ in size: only pages completely inside the hole count.
            first, end = -(-at // self.page_size), data // self.page_size
            if first < end:
                holes.append((first, end))
            at = self._seek_hole(data) if data < self.length else self.length
        return np.array(holes, dtype=np.int64).reshape(-1, 2)

    def _seek_data(self, offset: int) -> int:
        """The first allocated byte at or after `offset`; the length if there is none."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.length
            raise

    def _seek_hole(self, offset: int) -> int:
        return os.lseek(self.fd, offset, os.SEEK_HOLE)

    # -- writing ---------------------------------------------------------------------------------------------------

    def store(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """See RamBlock. The bytes of one row are contiguous; the rows may lie apart, as in a receive buffer.

        Raises MachineError if the host has no more memory.
        """
        self._check(pages)
        assert data.shape == (len(pages), self.page_size), f"{data.shape} is no shape for {len(pages)} pages"
        if len(pages) == 0:
            return
        gaps = np.flatnonzero(pages[1:] - pages[:-1] != 1) + 1
        if (len(gaps) + 1) * PAGES_A_CALL > len(pages):
            self.pages[pages] = data
            return
        try:
            for first, end in pairwise((0, *gaps.tolist(), len(pages))):
                iovec.pwritev(self.fd, iovec.rows(data[first:end]), int(pages[first]) * self.page_size)
        except OSError as error:
            raise _failed(self.idstr, self.length, "cannot write", error) from None

    def fill(self, pages: NDArray[np.int64], value: int) -> None:
        """See RamBlock. Pages in any order."""
        self._check(pages)
        if value == 0:
            pages = self._touched(pages)
        if len(pages) == 0:
            return
        runs = runs_of_pages(pages)
        if len(runs) * PAGES_A_CALL > len(pages):
            self.pages[pages] = value
            return
        for first, end in runs.tolist():
            self._fill_run(first, end, value)

    def _fill_run(self, first: int, end: int, value: int) -> None:
        """Fill a run, giving whole huge pages that become zero back to the host. That takes a fortieth of the time of
        writing zeros, and frees memory that was allocated in advance for pages that are zero."""
        if value == 0:
            size = self.page_size
            start, stop = -(-first * size // hugefile.HUGE) * hugefile.HUGE, end * size // hugefile.HUGE * hugefile.HUGE
            if start < stop:
                self._mapping.madvise(mmap.MADV_REMOVE, start, stop - start)
                self.pages[first : start // size] = 0
                first = stop // size
        self.pages[first:end] = value

    def release(self, runs: Runs) -> None:
        """See RamBlock."""
        try:
            for first, end in runs.tolist():
                self._mapping.madvise(mmap.MADV_REMOVE, first * self.page_size, (end - first) * self.page_size)
        except OSError as error:
            raise _failed(self.idstr, self.length, "cannot give back", error) from None

    def _touched(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the pages that are not in a hole.

        Walks pages and extents side by side: at most two system calls per extent, and one for a block that was never
        touched.
        """
        pages = np.sort(pages)
        touched: list[NDArray[np.int64]] = []
        at = 0
        while at < len(pages):
            data = self._seek_data(int(pages[at]) * self.page_size)
            if data >= self.length:
                break
            at = int(np.searchsorted(pages, data // self.page_size))
            hole = -(-self._seek_hole(data) // self.page_size)
            end = int(np.searchsorted(pages, hole))
            touched.append(pages[at:end])
            at = end
        return np.concatenate(touched) if touched else pages[:0]

    def _check(self, pages: NDArray[np.int64]) -> None:
        if len(pages) and (int(pages.min()) < 0 or int(pages.max()) >= self.page_count):
            raise IndexError(f"pages {pages.min()} to {pages.max()} of RAM block '{self.idstr}' with {self.page_count}")

    def close(self) -> None:
        """Unmap and close. Idempotent. The memory stays mapped as long as an array of it exists."""
        if self.fd < 0:
            return
        self.dirty_log.stop()
        os.close(self.fd)
        self.fd = -1
        self.view = memoryview(b"")
        self.pages = np.empty((0, self.page_size), dtype=np.uint8)
        try:
            self._mapping.close()
        except BufferError:
            del self._mapping


def _make_memfd(idstr: str, length: int) -> int:
    """Raises MachineError."""
    fd = -1
    try:
        # The kernel accepts names of up to 249 bytes; they only show in /proc.
        fd = os.memfd_create(idstr.encode()[:249].decode(errors="ignore"), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise _failed(idstr, length, "cannot make", error) from None
    return fd


def _failed(idstr: str, length: int, what: str, error: OSError | ValueError) -> MachineError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return MachineError(f"{what} RAM block '{idstr}' of {format_size(length)}: {reason}")
