"""A file, or standard input, as the source of a stream."""

from __future__ import annotations

import io
import os
import stat
import sys
from typing import Self

from corefw.closing import Closing
from corefw.errors import ChannelError, StreamError
from corefw.net.streamfile import StreamFile


class FileSource(Closing, StreamFile):
    """Reads the stream in a file. Its errors are ChannelErrors that name the file."""

    def __init__(self, file: io.FileIO, name: str, offset: int = 0) -> None:
        self._file = file
        self._name = name
        try:
            super().__init__(file.fileno(), offset)
        except StreamError as error:
            file.close()
            raise ChannelError(f"'{name}' is {error}") from None
        except OSError as error:
            file.close()
            raise ChannelError(f"cannot read '{name}': {error.strerror}") from None

    @classmethod
    def open(cls, path: str, offset: int = 0) -> Self:
        """`path` may be "-" for standard input. Raises ChannelError."""
        if path == "-":
            return cls(io.FileIO(sys.stdin.fileno(), closefd=False), "standard input", offset)
        try:
            return cls(io.FileIO(path), path, offset)
        except OSError as error:
            raise ChannelError(f"cannot open '{path}': {error.strerror}") from None

    @property
    def size(self) -> int | None:
        """Bytes from the start of the stream to the end of the file; None if that is not known."""
        found = os.fstat(self._file.fileno())
        return found.st_size - self.origin if stat.S_ISREG(found.st_mode) and not self.is_compressed else None

    def receive_into(self, view: memoryview, /) -> int:
        """Some bytes into the start of `view`; 0 at the end. Raises ChannelError."""
        try:
            return super().receive_into(view)
        except OSError as error:
            raise ChannelError(f"cannot read '{self._name}': {error.strerror}") from None

    def close(self) -> None:
        self._file.close()
