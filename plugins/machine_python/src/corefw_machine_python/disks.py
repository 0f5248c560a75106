"""Disks of a program: raw files that it reads and writes, with dirty bitmaps for backups.

The file does not move with the program. Both hosts need it, on shared storage or as a copy. It is open, and locked,
only while the guest runs: what the guest wrote has reached the disk before the guest runs elsewhere, no host reads
stale cached data, and two guests never write to one file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from corefw.block import SECTOR
from corefw.errors import MachineError, UsageError
from corefw.quantities import format_size
from corefw_machine_python.declarations import HasOptions, Options
from corefw_machine_python.writelog import WriteLog

MAX_DISKS: Final = 100

DiskPath = str | Callable[[Any], str]
DiskSize = int | None | Callable[[Any], int | None]

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}\Z")
"""What QEMU takes for the name of a node."""

_LOCKS, _UNLOCKS = (
    tuple(struct.pack("hhqqi", kind, os.SEEK_SET, start, 3, 0) for start in (101, 201))
    for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK)
)
"""The bytes that a QEMU locks when it writes to an image, and when it lets nobody else do so (QEMU 10.0,
block/file-posix.c). Readers that share the image (force-share) need neither."""

_COPIED: Final = 1 << 20


class Disk:
    """A disk, as the program sees it. Its methods may be called from any thread of the program.

    name     the name in the declaration
    path     of the file
    length   bytes
    """

    def __init__(self, name: str, path: str, length: int, log: WriteLog) -> None:
        self.name: Final = name
        self.path: Final = path
        self.length: Final = length
        self._log = log
        self._writing = threading.Lock()
        self._using = threading.Condition()  # of _fd and _users
        self._fd = -1
        self._users = 0  # calls that use _fd
        self._process = os.getpid()

    def __repr__(self) -> str:
        return f"<Disk '{self.name}' of {format_size(self.length)} in {self.path}>"

    # -- for the program -------------------------------------------------------------------------------------------

    def pread(self, length: int, offset: int) -> bytes:
        """Read exactly `length` bytes from `offset` on. Raises ValueError for bytes beyond the end, OSError."""
        self._check(length, offset)
        if os.getpid() == self._process:
            with self._file() as fd:
                if fd >= 0:
                    return self._read(fd, length, offset)
        with Path(self.path).open("rb") as file:
            return self._read(file.fileno(), length, offset)

    def _read(self, fd: int, length: int, offset: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = os.pread(fd, length - len(data), offset + len(data))
            if not piece:
                raise OSError(errno.EIO, f"disk '{self.name}' has become shorter than {self.length} bytes", self.path)
            data += piece
        return bytes(data)

    def pwrite(self, data: bytes | bytearray | memoryview | NDArray[Any], offset: int) -> None:
        """Write all bytes of `data`, in C order, at `offset`. Dirty bitmaps have the write when this returns; see
        flush() for when the disk has it.

        Raises ValueError for bytes beyond the end, OSError, RuntimeError while the guest is stopped and in a forked
        process.
        """
        view = data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else memoryview(data)
        self._check(view.nbytes, offset)
        self._check_process()
        if not view.nbytes:
            return
        view = view.cast("B")
        with self._writing, self._file() as fd:
            if fd < 0:
                raise RuntimeError(f"disk '{self.name}': a program that is stopped cannot write to it")
            self._log.begin(offset, offset + len(view))
            try:
                _write(fd, view, offset)
            finally:
                self._log.finish(offset, offset + len(view))

    def flush(self) -> None:
        """Wait until everything that was written is on the disk. A stop does it by itself. Raises OSError."""
        self._check_process()
        with self._file() as fd:
            if fd >= 0:
                os.fdatasync(fd)

    @contextmanager
    def _file(self) -> Iterator[int]:
        """The descriptor of the file, which stays open during the block; -1 while the program is stopped."""
        with self._using:
            fd = self._fd
            self._users += 1
        try:
            yield fd
        finally:
            with self._using:
                self._users -= 1
                self._using.notify_all()

    def _check(self, length: int, offset: int) -> None:
        if length < 0 or not 0 <= offset <= self.length - length:
            raise ValueError(f"disk '{self.name}' has {self.length} bytes: {length} at {offset} are not among them")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(f"disk '{self.name}': only the guest's own process can write to it, not one it forked")

    # -- for the guest's main loop ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Open and lock the file; the program may write from now on. Does nothing if it is open. Raises MachineError,
        with the disk closed."""
        if self._fd >= 0:
            return
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MachineError(f"cannot open disk '{self.name}': {self.path}: {error.strerror}") from None
        try:
            self._take_lock(fd)
            if (length := length_of(fd)) != self.length:
                raise MachineError(f"disk '{self.name}' had {self.length} bytes, and now has {length} ({self.path})")
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _take_lock(self, fd: int) -> None:
        try:
            for lock in _LOCKS:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise MachineError(
                    f"disk '{self.name}' is in use: another guest, or a QEMU, has {self.path} open"
                ) from None
            sys.stderr.write(f"migfw: disk '{self.name}' is not locked: {self.path}: {error.strerror}\n")

    def close(self) -> None:
        """Wait for calls under way, flush, unlock and close the file. Does nothing if it is closed. Raises
        MachineError, with the disk open."""
        with self._using:
            fd, self._fd = self._fd, -1
            self._using.wait_for(lambda: not self._users)
        if fd < 0:
            return
        try:
            os.fdatasync(fd)
        except OSError as error:
            self._fd = fd
            raise MachineError(f"cannot flush disk '{self.name}': {self.path}: {error.strerror}") from None
        # Closing is not enough: a process that the program has forked has the file open, too.
        with contextlib.suppress(OSError):
            for lock in _UNLOCKS:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        os.close(fd)


def _write(fd: int, view: memoryview, offset: int) -> None:
    while view:
        try:
            count = os.pwrite(fd, view, offset)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            # Pages of an array that are still on their way (postcopy). Copying them waits for them.
            count = os.pwrite(fd, bytes(view[:_COPIED]), offset)
        view, offset = view[count:], offset + count


class DeclaredDisk:
    """See guest.disk()."""

    def __init__(self, name: str, path: DiskPath, size: DiskSize) -> None:
        if not _NAME.match(name):
            raise ValueError(
                f"a disk's name has up to 31 letters, digits and '._-' and begins with a letter, got '{name}'"
            )
        self.name = name
        self._path = path
        self._size = size
        self.attribute = name

    def __set_name__(self, owner: type, attribute: str) -> None:
        self.attribute = attribute

    @overload
    def __get__(self, program: None, owner: type) -> DeclaredDisk: ...
    @overload
    def __get__(self, program: HasOptions, owner: type) -> Disk: ...
    def __get__(self, program: HasOptions | None, owner: type) -> DeclaredDisk | Disk:
        if program is None:
            return self
        disk: Disk | None = program.__dict__.get(self.attribute)
        if disk is None:
            raise AttributeError(f"disk '{self.name}' does not exist yet: use it in setup(), after_start() or tick()")
        return disk

    def __set__(self, program: HasOptions, value: object) -> None:
        raise AttributeError(
            f"a disk cannot be replaced: write to it, as in self.{self.attribute}.pwrite(data, offset)"
        )

    def prepare(self, options: Options, *, incoming: bool) -> tuple[str, int]:
        """The absolute path and the length of the file, which is created if it does not exist and the guest begins
        here. Raises UsageError."""
        path, size = self._evaluated(self._path, options), self._evaluated(self._size, options)
        if not isinstance(path, str) or not path:
            raise UsageError(f"disk '{self.name}' has no path with these options (got {path!r})")
        if size is not None and (not isinstance(size, int) or size <= 0 or size % SECTOR):
            raise UsageError(f"disk '{self.name}' would have {size} bytes: a disk has a multiple of {SECTOR}")
        path = str(Path(path).absolute())
        try:
            length = self._create(path, size) if size is not None and not incoming else None
            return path, self._existing(path, size) if length is None else length
        except OSError as error:
            hint = " (a destination needs the file too: shared storage, or a copy)" if incoming else ""
            raise UsageError(f"disk '{self.name}': {path}: {error.strerror}{hint}") from None

    def _evaluated(self, given: Any, options: Options) -> Any:
        try:
            return given(options) if callable(given) else given
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - the author's own function: it may raise anything
            raise UsageError(f"disk '{self.name}' cannot be found with these options: {error}") from None

    def _create(self, path: str, size: int) -> int | None:
        """Create the file; None if there is one already."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(fd, "r+b") as file:
            file.truncate(size)
        return size

    def _existing(self, path: str, size: int | None) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not (stat.S_ISREG(mode := os.fstat(fd).st_mode) or stat.S_ISBLK(mode)):
                raise UsageError(f"disk '{self.name}': {path} is neither a file nor a block device")
            length = length_of(fd)
        finally:
            os.close(fd)
        if size is not None and length != size:
            raise UsageError(f"disk '{self.name}': {path} has {length} bytes, the program wants {size}")
        if not length or length % SECTOR:
            raise UsageError(f"disk '{self.name}': {path} has {length} bytes: a disk has a multiple of {SECTOR}")
        return length


class Disks:
    """All disks of a program, for the guest's main loop. Raises UsageError if the program declares one wrongly, or if a
    file is not as declared."""

    def __init__(self, program: type, options: Options, *, incoming: bool) -> None:
        found: dict[str, object] = {}
        for base in reversed(program.__mro__):
            found.update(vars(base))
        self._declared = [one for one in found.values() if isinstance(one, DeclaredDisk)]
        names = [disk.name for disk in self._declared]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"program '{program.__name__}': two disks have the name '{min(twice)}'")
        if len(names) > MAX_DISKS:
            raise UsageError(f"program '{program.__name__}': more than {MAX_DISKS} disks")
        self._files = [disk.prepare(options, incoming=incoming) for disk in self._declared]
        self._disks: list[Disk] = []

    @property
    def attributes(self) -> set[str]:
        """Attribute names of the disks."""
        return {disk.attribute for disk in self._declared}

    def described(self) -> list[dict[str, object]]:
        """What the engine has to know of each disk."""
        pairs = zip(self._declared, self._files, strict=True)
        return [{"name": disk.name, "path": path, "length": length} for disk, (path, length) in pairs]

    def bind(self, program: HasOptions, logs: Sequence[int]) -> None:
        """Give the program its disks, with these logs of writes (descriptors, which become theirs)."""
        for declared, (path, length), fd in zip(self._declared, self._files, logs, strict=True):
            self._disks.append(Disk(declared.name, path, length, WriteLog(fd)))
            program.__dict__[declared.attribute] = self._disks[-1]

    def open(self) -> None:
        """Open all, before the program runs. Raises MachineError, with all of them closed."""
        try:
            for disk in self._disks:
                disk.open()
        except MachineError:
            self.close()
            raise

    def close(self) -> None:
        """Close all, when the program has stopped. Raises MachineError; some may be closed then."""
        for disk in self._disks:
            disk.close()


def length_of(fd: int) -> int:
    """Bytes of a file or block device. Raises OSError."""
    return os.lseek(fd, 0, os.SEEK_END)
