"""The source's half: sends the chunks of the file in passes, as RAM is sent.

body     any number of records, then END
CHUNK    u8 1, u64 number of the chunk, u32 length, that many bytes
SIZE     u8 2, u64 size of the file; once, in the END body
END      u8 0
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from corefw.section import LiveSaver, OutgoingContext, Pending, Priority
from corefw.wire.stream import StreamWriter
from migfw_file.changing import CHUNK, ChangingFile

IDSTR: Final = "file"
VERSION: Final = 1


class Record(IntEnum):
    END = 0
    CHUNK = 1
    SIZE = 2


class FileSaver(LiveSaver):
    """Sends the file at `path`, or nothing if `path` is empty.

    The file belongs to this plugin and not to the machine, so covers() is not overridden. The source keeps its file
    however the migration ends, so committed() and abandoned() have nothing to do.
    """

    idstr = IDSTR
    version_id = VERSION
    priority = Priority.EARLY  # the file goes first, then the RAM

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: ChangingFile | None = None
        self._sent = 0

    def active(self) -> bool:
        return bool(self.path)

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self._file = ChangingFile(self.path)
        writer.u8(Record.END)

    def pending_estimate(self) -> Pending:
        return Pending(must_precopy=len(self._open.dirty) * CHUNK, can_postcopy=0)

    def pending_exact(self) -> Pending:
        self._open.harvest()
        return self.pending_estimate()

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        end = writer.position + budget
        for chunk in list(self._open.dirty):
            self._send(writer, chunk)
            if writer.position >= end:
                break
        writer.u8(Record.END)
        return not self._open.dirty

    def complete(self, writer: StreamWriter) -> None:
        """Send the rest. The guest is stopped, so the file no longer changes."""
        self._open.harvest()
        for chunk in list(self._open.dirty):
            self._send(writer, chunk)
        writer.u8(Record.SIZE)
        writer.be64(self._open.size())
        writer.u8(Record.END)

    def cleanup(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def statistics(self) -> Mapping[str, object]:
        return {"path": self.path, "chunks-sent": self._sent} if self.path else {}

    def _send(self, writer: StreamWriter, chunk: int) -> None:
        data = self._open.take(chunk)
        writer.u8(Record.CHUNK)
        writer.be64(chunk)
        writer.be32(len(data))
        writer.write(data)
        self._sent += 1

    @property
    def _open(self) -> ChangingFile:
        assert self._file is not None, "called before setup()"
        return self._file
