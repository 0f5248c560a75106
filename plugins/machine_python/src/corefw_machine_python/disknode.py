"""The engine's half of a python guest's disk: a block node that takes in what the guest's process has written."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import Any

from corefw.block import BlockNode, ByteRuns, no_byte_runs
from corefw_machine_python import writelog
from corefw_machine_python.writelog import WriteLog

log = logging.getLogger(__name__)


class DiskNode(BlockNode):
    """A disk of a python guest. Device and node have the name from the program's declaration."""

    def __init__(self, loaded: dict[str, Any]) -> None:
        """`loaded` is the disk in the guest's answer to "load". Raises MachineError."""
        super().__init__(loaded["name"], loaded["length"], device=loaded["name"], filename=loaded["path"])
        self._log: WriteLog | None = WriteLog(writelog.create(self.name, self.length))
        self._flushing: threading.Thread | None = None

    @property
    def log_fd(self) -> int:
        """Descriptor of the log, for the guest's process."""
        assert self._log is not None, "the node is closed"
        return self._log.fd

    def collect(self) -> ByteRuns:
        return no_byte_runs() if self._log is None else self._log.take()

    def begin_flush(self) -> None:
        """Begin to flush the file in the background, while the guest runs, unless that is under way. The guest flushes
        it when it stops, and has less left to do. Not thread-safe; does not raise."""
        if not self.is_flushing:
            self._flushing = threading.Thread(target=self._flush, name=f"flush-{self.name}", daemon=True)
            with contextlib.suppress(RuntimeError):  # the host gives us no thread
                self._flushing.start()

    @property
    def is_flushing(self) -> bool:
        """Whether that is under way."""
        return self._flushing is not None and self._flushing.is_alive()

    def _flush(self) -> None:
        try:
            fd = os.open(self.filename, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:  # the guest's own flush reports it
            log.debug("disk '%s' could not be flushed: %s", self.name, error)

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
