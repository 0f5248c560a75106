"""file:PATH[,offset=N]: a stream in a file, alone, from byte N on, or in a libvirt save image.

Invariant: PATH holds a whole stream or what it held before (see WholeFile). The stream contains the guest's memory, so
no other user can choose where it goes or who reads it: a symbolic link at PATH is replaced, not followed, and only a
file of this user keeps its mode. A device or a FIFO is used as it is, unless another user created it.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Final

from corefw.channel import Channel, FileBacked, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.errors import ChannelError, StreamError, UriError, UsageError
from corefw.net.sockets import reason
from corefw.net.streamfile import StreamFile, split_offset
from corefw.net.wholefile import WholeFile
from corefw.uri import MigrationUri
from corefw_transport_exec.pipe import OneShotListener, PipeChannel

log = logging.getLogger(__name__)

_FEATURES: Final = TransportFeatures(return_path=False, multi_channel=False)
"""For a device or a FIFO; a new file is atomic."""

_RETRY: Final = 0.05
"""Seconds between two attempts to open a FIFO that has no reader yet."""


class FileTransport(Transport):
    """file:PATH"""

    features = _FEATURES

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        super().__init__(uri, context)
        if "\0" in uri.rest:
            raise UriError(f"'{uri}': a path has no zero byte")
        try:
            path, self._offset = split_offset(uri.rest)
        except UsageError as error:
            raise UriError(f"'{uri}': {error}") from None
        if path.endswith("/"):
            raise UriError(f"'{uri}' names a directory: expected file:PATH of a file")
        self._path = Path(path)

    def connect(self, interrupt: Interrupt) -> Channel:
        interrupt.check()
        try:
            if self._is_replaced():
                self.features = replace(_FEATURES, atomic=True)
                return NewFileChannel(self._path.absolute(), self.uri, self._offset)
            self._check_has_no_offset()
            return PipeChannel(self._open_for_writing(interrupt), str(self.uri), outgoing=True)
        except OSError as error:
            raise self._error(error) from None

    def listen(self) -> Listener:
        """Open the file, so that an error shows before anything waits for it."""
        try:
            if self._path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
            mode = os.fstat(fd).st_mode
        except OSError as error:
            raise self._error(error) from None
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            channel = self._stored(fd)
            return OneShotListener(self.uri, lambda: channel, channel.close)
        try:
            self._check_has_no_offset()
        except ChannelError:
            os.close(fd)
            raise
        # A FIFO without a writer would read as ended; it becomes readable when the first one writes.
        return OneShotListener(
            self.uri, lambda: PipeChannel(fd, str(self.uri), outgoing=False), lambda: os.close(fd), waits_for=fd
        )

    def _stored(self, fd: int) -> Channel:
        """The channel for a file that holds a stream. Owns `fd`."""
        try:
            return StoredFileChannel(fd, str(self.uri), StreamFile(fd, self._offset))
        except (OSError, StreamError) as error:
            os.close(fd)
            raise self._error(error) if isinstance(error, OSError) else ChannelError(f"{self.uri} is {error}") from None

    def _check_has_no_offset(self) -> None:
        if self._offset:
            raise ChannelError(f"{self.uri}: an offset needs a regular file")

    def _is_replaced(self) -> bool:
        """Whether a new file takes the name PATH: if there is a regular file, a link to one, or nothing. A device, a
        FIFO and a link to an open file (such as /dev/stdout) are written to instead. Raises OSError."""
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        if stat.S_ISDIR(there.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return stat.S_ISREG(there.st_mode) and not _leads_to_open_file(self._path)

    def _open_for_writing(self, interrupt: Interrupt) -> int:
        """Open the device or FIFO. Raises OSError, Interrupted, and ChannelError if another user created it."""
        self._check_trusted(self._path.lstat())
        while True:
            try:
                fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
                break
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            interrupt.wait(_RETRY)
            interrupt.check()
        try:
            self._check_trusted(os.fstat(fd))
        except ChannelError:
            os.close(fd)
            raise
        return fd

    def _check_trusted(self, there: os.stat_result) -> None:
        """Raise ChannelError for a FIFO or link of another user, who may want to read the guest's memory. (The system
        decides who owns a terminal or device.)"""
        made_by_a_user = stat.S_ISFIFO(there.st_mode) or stat.S_ISLNK(there.st_mode)
        if made_by_a_user and there.st_uid not in (0, os.geteuid()):
            what = "FIFO" if stat.S_ISFIFO(there.st_mode) else "symbolic link"
            raise ChannelError(
                f"{self.uri}: it is a {what} that user {there.st_uid} made, who may want to read the guest's memory"
                " (remove it, or choose another path)"
            )

    def _error(self, error: OSError) -> ChannelError:
        return ChannelError(f"{self.uri}: {reason(error)}")


class StoredFileChannel(PipeChannel, FileBacked):
    """Reads the stream in a file."""

    def __init__(self, fd: int, peer: str, stream: StreamFile) -> None:
        super().__init__(fd, peer, outgoing=False)
        self._stream = stream
        self.origin = stream.origin

    def receive_into(self, view: memoryview) -> int:
        assert len(view), "receive_into an empty view"
        self._check(outgoing=False)
        try:
            return self._stream.receive_into(view)
        except OSError as error:
            raise self._failed(error) from None

    def skip(self, count: int) -> None:
        self._check(outgoing=False)
        try:
            self._stream.skip(count)
        except OSError as error:
            raise self._failed(error) from None


class NewFileChannel(PipeChannel):
    """Writes a file that takes the name `target` at send_eof. Its first `kept` bytes are those that `target` had
    before, or zeros."""

    def __init__(self, target: Path, uri: MigrationUri, kept: int = 0) -> None:
        if target.is_symlink():
            log.warning("%s: there is a symbolic link; the new file replaces the link, not its target", uri)
        self._file = WholeFile(target, kept)
        super().__init__(os.dup(self._file.fileno()), str(uri), outgoing=True)

    def _finish(self) -> None:
        try:
            self._file.sync()
            self._check_aborted()
            self._file.rename()
        except OSError as error:
            raise self._failed(error) from None
        self._let_go()

    def _leave(self) -> None:
        self._file.close()


def _leads_to_open_file(path: Path) -> bool:
    """Whether it is in /proc, or a link to something there."""
    names = [path, path.parent / path.readlink()] if path.is_symlink() else [path]
    return any(Path("/proc") in name.parent.resolve().parents for name in names)
