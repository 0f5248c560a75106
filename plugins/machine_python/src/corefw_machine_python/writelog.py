"""The log of what a guest has written to one disk, in memory that its process shares with the engine.

The guest adds the sectors of a write when it has completed, and the engine takes them whenever it likes; neither waits
for the other. A byte stands for a sector, and only its owner's plain stores touch it: the guest stores 1, the engine
stores 0 where it has just read 1. A store of the guest that comes in between adds a sector that the engine reports from
what it has read, so nothing is lost and no lock is needed.

The write under way is in the header. If the guest is killed in the middle of it, nobody knows how much of it reached
the disk, and recover() adds all of it.

    offset 0       u64 under way (1 or 0), u64 first sector, u64 end sector (exclusive)
    offset 4096    a byte for each sector of 512 bytes

Memory is allocated where sectors were written: 1/512 of that part of the disk.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

import numpy as np

from corefw.block import SECTOR, ByteRuns, no_byte_runs
from corefw.errors import MachineError
from corefw.memory.runs import runs_of_mask
from corefw.quantities import format_size

_HEADER: Final = 4096
_PIECE: Final = 1 << 20
"""Bytes of the log that are looked at together."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, length: int) -> int:
    """Make the memory for a disk of `length` bytes; returns its descriptor, which the caller owns. Raises
    MachineError."""
    fd = -1
    try:
        fd = os.memfd_create(f"writes of {name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _HEADER + -(-length // SECTOR // _HEADER) * _HEADER)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise MachineError(f"cannot log the writes to disk '{name}': {error.strerror}") from None
    return fd


class WriteLog:
    """The log behind one descriptor. begin() and finish() are called by the guest, one write at a time; take() and
    recover() by the engine, one call at a time."""

    def __init__(self, fd: int) -> None:
        """Map the memory; the log owns `fd` when this returns. Raises MachineError."""
        self.fd: Final = fd
        size = os.fstat(fd).st_size
        try:
            mapping = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise MachineError(f"cannot map {format_size(size)} for the log of a disk's writes: {error}") from None
        self._header = memoryview(mapping)[:24].cast("Q")
        self._sectors = np.frombuffer(mapping, dtype=np.uint8, offset=_HEADER)

    # -- the guest's side ------------------------------------------------------------------------------------------

    def begin(self, offset: int, end: int) -> None:
        """Note that a write to these bytes is about to begin."""
        self._header[1], self._header[2] = offset // SECTOR, -(-end // SECTOR)
        self._header[0] = 1

    def finish(self, offset: int, end: int) -> None:
        """Add the sectors of these bytes: the write that begin() noted has ended, or has failed."""
        self._sectors[offset // SECTOR : -(-end // SECTOR)] = 1
        self._header[0] = 0

    # -- the engine's side -----------------------------------------------------------------------------------------

    def take(self) -> ByteRuns:
        """Return the ranges that were written since the last call, in ascending order; neighbours may touch."""
        found = [no_byte_runs()]
        at = _HEADER
        while (at := self._seek(at, os.SEEK_DATA)) < _HEADER + len(self._sectors):
            hole = self._seek(at, os.SEEK_HOLE)
            first = at // _HEADER * _HEADER - _HEADER
            found += [
                self._take(start, min(start + _PIECE, hole - _HEADER)) for start in range(first, hole - _HEADER, _PIECE)
            ]
            at = hole
        return np.concatenate(found) * SECTOR

    def _take(self, start: int, end: int) -> ByteRuns:
        sectors = self._sectors[start:end]
        if not sectors.max():
            return no_byte_runs()
        written = sectors != 0
        sectors[written] = 0
        return runs_of_mask(written, start)

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing is allocated from here on
                return _HEADER + len(self._sectors)
            raise

    def recover(self) -> None:
        """Add the write that was under way. Call it when the guest's process has ended."""
        under_way, first, end = self._header.tolist()
        if under_way:
            self._sectors[first:end] = 1
            self._header[0] = 0

    def close(self) -> None:
        """Free the memory."""
        self._header, self._sectors = memoryview(b""), np.empty(0, np.uint8)
        os.close(self.fd)
