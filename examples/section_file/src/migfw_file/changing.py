"""Track which chunks of a file have to be sent while others write to it.

The digest of a chunk is that of the bytes that were sent. If a write happens while a chunk is read, the bytes sent may
be old; then the next harvest finds another digest, and the chunk is sent again.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

from corefw.errors import MachineError

CHUNK: Final = 64 << 10
"""Bytes; the last chunk may have fewer."""


class ChangingFile:
    """An open file. Methods raise MachineError if the file system fails."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed("open", error) from error
        self._sent: dict[int, bytes] = {}  # chunk -> the digest of what was sent of it
        self.dirty = dict.fromkeys(range(self._count()))
        """The chunks to be sent, in the order in which they were found."""

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def harvest(self) -> None:
        """Find the chunks that differ from what was sent. Reads the whole file."""
        count = self._count()
        for chunk in range(count):
            if chunk not in self.dirty and _digest(self._read(chunk)) != self._sent.get(chunk):
                self.dirty[chunk] = None
        for chunk in [one for one in self.dirty if one >= count]:
            del self.dirty[chunk]  # the file has become shorter

    def take(self, chunk: int) -> bytes:
        """Read a dirty chunk to be sent, and mark it clean. Empty if the file has become shorter."""
        data = self._read(chunk)
        self._sent[chunk] = _digest(data)
        del self.dirty[chunk]
        return data

    def close(self) -> None:
        os.close(self._fd)

    def _count(self) -> int:
        return -(-self.size() // CHUNK)

    def _read(self, chunk: int) -> bytes:
        try:
            return os.pread(self._fd, CHUNK, chunk * CHUNK)
        except OSError as error:
            raise self._failed("read", error) from error

    def _failed(self, what: str, error: OSError) -> MachineError:
        return MachineError(f"cannot {what} '{self._path}', which moves with the guest: {error.strerror}")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
