"""The page faults of a guest whose RAM is still arriving, by userfaultfd.

The guest's mapping is registered for MISSING and MINOR faults. The engine receives into its own mapping of the same
memfd, and one UFFDIO_CONTINUE lets the guest see a run of pages. A page that lies in the page cache but was not
installed still faults, so the guest never sees half a page, nor an old one that has to be sent again.

The process that is watched calls open_faults() and passes the descriptor on. It keeps its own copy open, so that
pages that have not arrived are never seen if the engine is killed: its accesses wait until it is killed too.

Needs Linux 5.14 (minor faults on shared memory). Without a permission a system call of the guest fails with EFAULT on a
page that has not arrived (UFFD_USER_MODE_ONLY).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MachineError
from corefw.machine import FaultSource, GuestMapping, RamBlock
from corefw.memory import userfault
from corefw.memory.runs import Runs
from corefw.memory.slices import SHORT, USUAL, ask_for_slices

log = logging.getLogger(__name__)

SYSCTL: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")
FEATURES: Final = userfault.Feature.MISSING_SHMEM | userfault.Feature.MINOR_SHMEM | userfault.Feature.THREAD_ID
PAGE: Final = 4096
"""Bytes of a page in the stream, each of which is mapped when it has arrived."""
HOST_PAGE: Final = mmap.PAGESIZE
EVENTS: Final = 256
"""Faults that one read(2) takes."""
NAP: Final = 0.00002
"""Seconds until a mapping that the kernel was too busy for is tried again: the guest changes its mappings, and may need
this processor for that."""


@dataclass(frozen=True, slots=True)
class OpenedFaults:
    """A userfaultfd of this process.

    fd             for FaultQueue
    system_calls   whether a system call waits for missing pages, too; otherwise it fails with EFAULT
    """

    fd: int
    system_calls: bool


def open_faults() -> OpenedFaults:
    """A userfaultfd of this process, one that serves system calls where that is permitted. Raises MachineError that
    says what the host lacks."""
    if HOST_PAGE != PAGE:
        raise MachineError(
            f"page faults cannot be served here: pages come one by one with {PAGE} bytes, and the host maps {HOST_PAGE}"
            " bytes at once"
        )
    try:
        return OpenedFaults(userfault.create_unrestricted(FEATURES), system_calls=True)
    except OSError as error:
        log.debug("page faults of system calls cannot be served: %s", error)
    try:
        return OpenedFaults(userfault.create(FEATURES), system_calls=False)
    except OSError as error:
        raise MachineError(f"page faults cannot be served here: {_explain(error)}") from None


def _explain(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "the kernel has no minor faults on shared memory (expected Linux 5.14 or later)"
    if error.errno == errno.ENOSYS:
        return "the kernel has no userfaultfd, or a seccomp filter hides it (expected CONFIG_USERFAULTFD)"
    if error.errno == errno.EPERM:
        return (
            "userfaultfd is not permitted: allow it in the container's seccomp profile, give the process"
            f" CAP_SYS_PTRACE or access to {userfault.DEVICE}, or set the sysctl vm.unprivileged_userfaultfd to 1"
            f"{_sysctl()}"
        )
    return f"userfaultfd failed ({error.strerror})"


def _sysctl() -> str:
    try:
        return f" (it is {SYSCTL.read_text().strip()})"
    except OSError:
        return ""


class FaultQueue(FaultSource):
    """The faults in the memory of a process, which maps each of `blocks` at the address in `addresses`.

    userfaultfd   the descriptor that open_faults() returned in that process
    process       its id

    Owns the descriptor when this returns. Raises MachineError where the memory cannot be registered.
    Threads: install() may run in several threads at once, also beside poll().
    """

    def __init__(self, userfaultfd: int, blocks: Sequence[RamBlock], addresses: Sequence[int], process: int) -> None:
        self._fd = userfaultfd
        self._process = process
        self._threads = {0: 0}  # id as the kernel reports it -> id as poll() returns it
        self._addresses: dict[str, int] = {}
        try:
            for block, address in zip(blocks, addresses, strict=True):
                userfault.register(self._fd, address, block.length, userfault.Mode.MISSING | userfault.Mode.MINOR)
                self._addresses[block.idstr] = address
        except OSError as error:
            os.close(self._fd)
            raise MachineError(f"cannot watch the guest's memory for page faults: {_explain(error)}") from None
        self._blocks = {block.idstr: block for block in blocks}
        ask_for_slices(process, SHORT)  # so that a thread goes on as soon as its page is here

    @property
    def is_open(self) -> bool:
        """Whether the guest may be waiting for pages that will be installed."""
        return self._fd >= 0

    def fileno(self) -> int:
        return self._fd

    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        found: dict[str, set[tuple[int, int]]] = {}
        for place, thread in userfault.read_faults(self._fd, EVENTS):  # mostly one, so in plain Python
            for idstr, address in self._addresses.items():
                offset = place - address
                if 0 <= offset < self._blocks[idstr].length:
                    page = offset // self._blocks[idstr].page_size
                    found.setdefault(idstr, set()).add((page, self.own_thread(thread)))
        return {idstr: np.array(sorted(faults), dtype=np.int64) for idstr, faults in found.items()}

    def own_thread(self, thread: int) -> int:
        """The thread's id if it is one of the process; otherwise 0 (a debugger that reads its memory, for example)."""
        if thread not in self._threads:
            self._threads[thread] = thread if Path(f"/proc/{self._process}/task/{thread}").exists() else 0
        return self._threads[thread]

    def install(self, block: RamBlock, runs: Runs) -> None:
        address = self._addresses[block.idstr]
        for first, end in runs.tolist():
            try:
                self._install(block, address, first * block.page_size, end * block.page_size)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    return  # the guest has ended
                raise MachineError(f"cannot map pages of RAM block '{block.idstr}': {error.strerror}") from None

    def mapping(self, block: RamBlock) -> GuestMapping | None:
        return GuestMapping(self._fd, self._addresses[block.idstr]) if self._fd >= 0 else None

    def _install(self, block: RamBlock, address: int, start: int, end: int) -> None:
        at = start
        while at < end:
            try:
                mapped = userfault.map_existing(self._fd, address + at, end - at)
                at += mapped
                if not mapped:
                    time.sleep(NAP)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    at += self._map_hole(block, address, at, end)
                elif error.errno == errno.EEXIST:
                    userfault.wake(self._fd, address + at, block.page_size)
                    at += block.page_size
                else:
                    raise

    def _map_hole(self, block: RamBlock, address: int, start: int, end: int) -> int:
        """Map zeros from here to the end of the hole, where the file has no page that could be mapped; how many bytes.
        None if the page was written meanwhile."""
        end = min(end, _data_after(block.fd, start, block.length))
        try:
            return userfault.map_zeros(self._fd, address + start, end - start) if start < end else 0
        except OSError as error:
            if error.errno == errno.EEXIST:
                return 0
            raise

    def release(self) -> None:
        if self._fd < 0:
            return
        for idstr, address in self._addresses.items():
            try:
                userfault.unregister(self._fd, address, self._blocks[idstr].length)
            except OSError as error:  # the guest has ended, and its memory with it
                log.debug("cannot release the memory of block '%s': %s", idstr, error)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            ask_for_slices(self._process, USUAL)


def _data_after(fd: int, offset: int, length: int) -> int:
    """The first byte from `offset` on that is in no hole of the file; its length where there is none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return length
        raise


class NoFaults(FaultSource):
    """Those of a machine that waits for no page: all of its RAM is here, or it does not run."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # never readable

    @property
    def is_open(self) -> bool:
        """Whether RAM is still to arrive."""
        return self._fd >= 0

    def fileno(self) -> int:
        return self._fd

    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        return {}

    def install(self, block: RamBlock, runs: NDArray[np.int64]) -> None:
        """Nothing waits for it."""

    def mapping(self, block: RamBlock) -> GuestMapping | None:
        del block
        return GuestMapping(-1, 0)

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
