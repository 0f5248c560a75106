"""Write a file that appears under its name only once all of it is on the disk.

Until then it is a temporary file beside its target, mode 0600, which is removed if it is not finished: a full disk or a
killed guest leaves the old file as it was. A symbolic link at the target is replaced, never followed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from corefw.channel import Buffer
from corefw.closing import Closing
from corefw.net.socketfile import NO_LINKS

log = logging.getLogger(__name__)


class WholeFile(Closing):
    """Write, then `replace()` or `create()`; `close()` without one of these removes what was written.

    Every method except close() raises OSError; after that, only close() may be called.
    """

    def __init__(self, target: Path, kept: int = 0) -> None:
        """`kept` bytes at the start are those that `target` has now, or zeros.

        If there is a file of this user at `target`, the new one gets its mode.
        """
        self._target: Final = target.absolute()
        self._fd, name = tempfile.mkstemp(dir=self._target.parent, prefix=".migfw-", suffix=".partial")
        self._partial: Path | None = Path(name)
        try:
            with contextlib.suppress(FileNotFoundError):
                old = self._target.lstat()
                if stat.S_ISREG(old.st_mode) and old.st_uid == os.geteuid():
                    os.fchmod(self._fd, stat.S_IMODE(old.st_mode) & 0o777)
            if kept:
                self._copy_start(kept)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._fd

    def write(self, *parts: Buffer) -> None:
        for part in parts:
            rest = memoryview(part).cast("B")
            while len(rest):
                rest = rest[os.write(self._fd, rest) :]

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        self._written()
        os.fsync(self._fd)

    def replace(self) -> None:
        """Call sync(), then take the name, replacing any file."""
        self.sync()
        self.rename()

    def rename(self) -> None:
        """Take the name, replacing any file; for a caller that has called sync()."""
        self._written().rename(self._target)
        self._partial = None
        self._sync_directory()

    def create(self) -> None:
        """Call sync(), then take the name. Raises FileExistsError if it is taken."""
        self.sync()
        partial = self._written()
        try:
            os.link(partial, self._target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if os.path.lexists(self._target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            partial.rename(self._target)
            self._partial = None
        self._sync_directory()

    def close(self) -> None:
        """Idempotent; never raises."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._partial:
            with contextlib.suppress(OSError):
                self._partial.unlink()
            self._partial = None

    def _written(self) -> Path:
        """The temporary file. Raises OSError if another thread has closed this one."""
        if self._partial is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._partial

    def _copy_start(self, count: int) -> None:
        """Copy the first `count` bytes of the target, which may be shorter or missing; continue after them."""
        with contextlib.suppress(FileNotFoundError):
            before = os.open(self._target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                left = min(count, os.fstat(before).st_size)
                while left and (done := os.sendfile(self._fd, before, None, left)):
                    left -= done
            finally:
                os.close(before)
        os.ftruncate(self._fd, count)
        os.lseek(self._fd, count, os.SEEK_SET)

    def _sync_directory(self) -> None:
        """Write the name to the disk, too. The file is complete, so a failure is only logged."""
        try:
            fd = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            log.warning("the name of %s may not be on the disk yet: %s", self._target, error.strerror)
