"""A file, or standard input, as the source of a stream."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path
from typing import Self

from corefw.channel import FileBacked
from corefw.closing import Closing
from corefw.errors import ChannelError


class FileSource(Closing, FileBacked):
    """Reads a file as it is, without a copy. Its errors are ChannelErrors that name it."""

    def __init__(self, file: io.FileIO, name: str) -> None:
        self._file = file
        self._name = name
        self.origin = 0

    @classmethod
    def open(cls, path: str) -> Self:
        """`path` may be "-" for standard input. Raises ChannelError."""
        if path == "-":
            return cls(io.FileIO(sys.stdin.fileno(), closefd=False), "standard input")
        try:
            return cls(Path(path).open("rb", buffering=0), path)
        except OSError as error:
            raise ChannelError(f"cannot open '{path}': {error.strerror}") from None

    @property
    def size(self) -> int | None:
        """Of a file, all its bytes, read or not; None for what is none."""
        found = os.fstat(self._file.fileno())
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def receive_into(self, view: memoryview, /) -> int:
        """Some bytes into the start of `view`; 0 at the end. Raises ChannelError."""
        try:
            return self._file.readinto(view) or 0
        except OSError as error:
            raise ChannelError(f"cannot read '{self._name}': {error.strerror}") from None

    def skip(self, count: int) -> None:
        """See FileBacked; what is no file is read and forgotten. Raises ChannelError."""
        if self.size is not None:
            self._file.seek(count, os.SEEK_CUR)
            return
        scratch = memoryview(bytearray(min(count, 1 << 20)))
        while count and (done := self.receive_into(scratch[:count])):
            count -= done

    def close(self) -> None:
        self._file.close()
