"""file:PATH: a stream kept in a file.

The law: PATH holds a whole stream or what it held before. The stream goes to a temporary file beside it, which takes
the name when the sender has ended the stream and the bytes are on the disk; otherwise it is removed. A device or a FIFO
is written and read as it is.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from corefw.channel import Channel, Interrupt, Listener, Transport, TransportFeatures
from corefw.errors import ChannelError, UriError
from corefw.sockets import reason
from corefw.uri import MigrationUri
from corefw_transport_exec.pipe import OneShotListener, PipeChannel

log = logging.getLogger(__name__)

_FEATURES: Final = TransportFeatures(return_path=False, multi_channel=False)
"""Of a device or a FIFO; a new file is atomic."""

_RETRY: Final = 0.05
"""Seconds between two attempts to open a FIFO that nobody reads yet."""


class FileTransport(Transport):
    """file:PATH"""

    features = _FEATURES

    def __init__(self, uri: MigrationUri) -> None:
        super().__init__(uri)
        if "\0" in uri.rest:
            raise UriError(f"'{uri}': a path has no zero byte")
        if uri.rest.endswith("/"):
            raise UriError(f"'{uri}' names a directory: expected file:PATH of a file")
        self._path = Path(uri.rest)

    def connect(self, interrupt: Interrupt) -> Channel:
        interrupt.check()
        try:
            if self._can_be_replaced():
                self.features = replace(_FEATURES, atomic=True)
                return NewFileChannel(self._path.resolve(), self.uri)
            return PipeChannel(self._open_for_writing(interrupt), str(self.uri), outgoing=True)
        except OSError as error:
            raise self._error(error) from None

    def listen(self) -> Listener:
        """The file is opened here: what is wrong with it shows before anything waits for it."""
        try:
            if self._path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise self._error(error) from None

        def opens(interrupt: Interrupt) -> Channel:
            # A FIFO that nobody has opened for writing yet would read as ended; poll waits for the first writer.
            interrupt.wait_for(fd, select.POLLIN)
            return PipeChannel(fd, str(self.uri), outgoing=False)

        return OneShotListener(self.uri, opens, lambda: os.close(fd))

    def _can_be_replaced(self) -> bool:
        """Whether it is a regular file, or nothing yet. /dev/stdout and the like are somebody's open files."""
        try:
            mode = self._path.stat().st_mode
        except FileNotFoundError:
            return True
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        names = [self._path, self._path.parent / self._path.readlink()] if self._path.is_symlink() else [self._path]
        return stat.S_ISREG(mode) and not any(Path("/proc") in name.parent.resolve().parents for name in names)

    def _open_for_writing(self, interrupt: Interrupt) -> int:
        while True:
            try:
                return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            interrupt.wait(_RETRY)
            interrupt.check()

    def _error(self, error: OSError) -> ChannelError:
        return ChannelError(f"{self.uri}: {reason(error)}")


class NewFileChannel(PipeChannel):
    """Writes a file that takes the name `target` at send_eof."""

    def __init__(self, target: Path, uri: MigrationUri) -> None:
        fd, name = tempfile.mkstemp(dir=target.parent, prefix=".migfw-", suffix=".partial")
        with contextlib.suppress(FileNotFoundError):  # a new file stays private: it holds a guest's memory
            os.fchmod(fd, stat.S_IMODE(target.stat().st_mode))
        self._target = target
        self._partial: Path | None = Path(name)
        super().__init__(fd, str(uri), outgoing=True)

    def _finish(self) -> None:
        assert self._partial
        try:
            os.fsync(self._fd)
            self._check_aborted()
            self._partial.rename(self._target)
        except OSError as error:
            raise self._failed(error) from None
        self._partial = None
        try:
            _sync_directory(self._target.parent)
        except OSError as error:  # the file is there, whole: a failure now would leave two of the guest
            log.warning("%s: the new name may not be on the disk yet: %s", self.peer, reason(error))
        self._let_go()

    def _leave(self) -> None:
        if self._partial:
            with contextlib.suppress(OSError):
                self._partial.unlink()


def _sync_directory(path: Path) -> None:
    """Put the new name on the disk as well."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
