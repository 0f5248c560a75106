"""The engine's half of a python guest's disk: a block node that takes in what the guest's process has written."""

from __future__ import annotations

from typing import Any

from corefw.block import BlockNode, ByteRuns, no_byte_runs
from corefw_machine_python import writelog
from corefw_machine_python.writelog import WriteLog


class DiskNode(BlockNode):
    """A disk of a python guest. Device and node have the name from the program's declaration."""

    def __init__(self, loaded: dict[str, Any]) -> None:
        """`loaded` is the disk in the guest's answer to "load". Raises MachineError."""
        super().__init__(loaded["name"], loaded["length"], device=loaded["name"], filename=loaded["path"])
        self._log: WriteLog | None = WriteLog(writelog.create(self.name, self.length))

    @property
    def log_fd(self) -> int:
        """Descriptor of the log, for the guest's process."""
        assert self._log is not None, "the node is closed"
        return self._log.fd

    def collect(self) -> ByteRuns:
        return no_byte_runs() if self._log is None else self._log.take()

    def guest_ended(self) -> None:
        """Count a write that the guest's death may have cut short as done."""
        with self.settled():
            if self._log is not None:
                self._log.recover()

    def close(self) -> None:
        """Free the log; the bitmaps stay as they are. Call it when the guest's process has ended. Idempotent."""
        self.guest_ended()
        with self.settled():
            log, self._log = self._log, None
            if log is not None:
                log.close()
