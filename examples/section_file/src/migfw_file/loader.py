"""The destination's half: writes the file beside its place, and moves it there when the guest has arrived.

Invariant: the file at `path` is the old one, or the complete new one. Whatever can fail, above all a full disk, fails
in load(), while the source still has the guest; committed() only renames.

The stream is hostile: it says what is in the file, but not where the file is, nor that it may be larger than the limit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from corefw.errors import MachineError, StreamError
from corefw.section import IncomingContext, LiveLoader
from corefw.wire.stream import StreamReader
from migfw_file.changing import CHUNK
from migfw_file.saver import IDSTR, VERSION, Record


class FileLoader(LiveLoader):
    """Writes a file of at most `limit` bytes to `path`. If `path` is empty, refuses any file.

    partial   the temporary file; None until data arrives
    """

    idstr = IDSTR
    version_id = VERSION
    minimum_version = VERSION

    def __init__(self, path: str, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._fd = -1
        self._received = 0
        self.partial: Path | None = None

    def required(self) -> bool:
        """Accept a source that sends no file."""
        return False

    def setup(self, context: IncomingContext) -> None:
        """Create nothing yet, because the source may send no file."""

    def load(self, reader: StreamReader, version_id: int) -> None:
        """Write a body to the temporary file. Raises MachineError if the disk fails."""
        if version_id != VERSION:
            raise reader.error(f"version {VERSION} of the file's format", f"version {version_id}")
        if self.partial is None:
            self._create()
        while (kind := reader.u8("a record of the file")) != Record.END:
            if kind == Record.CHUNK:
                self._load_chunk(reader)
            elif kind == Record.SIZE:
                self._load_size(reader)
            else:
                raise reader.error("a record of the file", f"one of the kind {kind}")

    def cleanup(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def committed(self) -> None:
        if self.partial is not None:
            with self._disk("move"):
                self.partial.replace(self._path)
            self.partial = None

    def abandoned(self) -> None:
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)
            self.partial = None

    def statistics(self) -> Mapping[str, object]:
        return {"path": self._path, "chunks-received": self._received} if self._path else {}

    def _create(self) -> None:
        if not self._path:
            raise StreamError("the source sends a file along (set parameter 'x-file' here, to where it is to be put)")
        place = Path(self._path).absolute()
        with self._disk("write"):
            self._fd, partial = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        self.partial = Path(partial)

    def _load_chunk(self, reader: StreamReader) -> None:
        number = reader.be64("the number of a chunk")
        length = reader.be32("the length of a chunk")
        if length > CHUNK or number * CHUNK + length > self._limit:
            raise reader.error(
                f"a chunk of at most {CHUNK} bytes in a file of at most {self._limit} (parameter x-file-limit)",
                f"{length} bytes at {number * CHUNK}",
            )
        data = reader.read(length, "a chunk")
        with self._disk("write"):
            written = os.pwrite(self._fd, data, number * CHUNK)
        if written < length:
            raise MachineError(f"cannot write '{self._path}', which moves with the guest: No space left on device")
        self._received += 1

    def _load_size(self, reader: StreamReader) -> None:
        size = reader.be64("the size of the file")
        if size > self._limit:
            raise reader.error(f"a file of at most {self._limit} bytes (parameter x-file-limit)", f"one of {size}")
        with self._disk("write"):
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)  # a disk that is full may say so only now

    @contextmanager
    def _disk(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineError(f"cannot {what} '{self._path}', which moves with the guest: {error.strerror}") from error
