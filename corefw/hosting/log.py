"""The log of an engine without a terminal: everything that it and its guest print.

An engine has its log locked as long as it lives, so no two engines write to one file, and old logs can be told apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Final

from corefw.errors import UsageError
from corefw.net.sockets import reason
from corefw.qmp.address import log_directory

LOG_LIMIT: Final = 8 << 20
"""Bytes of a log. When it grows beyond, its older half is dropped."""

LOG_DAYS: Final = 30
"""Days that the log of an engine that has ended is kept."""

_TRIM_SECONDS: Final = 2.0


def open_log(name: str) -> tuple[Path, int]:
    """Open an empty log that no other engine writes to, with mode 0600. Raises UsageError."""
    try:
        folder = log_directory()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_old_logs(folder)
        number = 1
        while True:
            path = folder / (f"{name}.log" if number == 1 else f"{name}-{number}.log")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                number += 1
                continue
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, 0)
            return path, fd
    except OSError as error:
        where = f"'{error.filename}'" if error.filename else "a file"
        raise UsageError(f"cannot use {where} as the engine's log: {reason(error)} (set XDG_STATE_HOME)") from None


def _remove_old_logs(folder: Path) -> None:
    """Delete logs that nothing was written to for LOG_DAYS, unless their engine still runs: it has them locked."""
    oldest = time.time() - LOG_DAYS * 86400
    for path in folder.glob("*.log"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < oldest:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(fd)


def keep_short(fd: int) -> None:
    """Trim the log regularly while the process lives. Output written at that moment may be lost."""
    waiting = threading.Event()
    while not waiting.wait(_TRIM_SECONDS):
        with contextlib.suppress(OSError):
            trim(fd)


def trim(fd: int, limit: int = LOG_LIMIT) -> None:
    """Keep the newer half of a log (open for appending) that is longer than `limit`. Raises OSError."""
    size = os.fstat(fd).st_size
    if size <= limit:
        return
    tail = os.pread(fd, limit // 2, size - limit // 2)
    os.ftruncate(fd, 0)
    os.write(fd, b"(the log was longer; this is its end)\n" + tail[tail.find(b"\n") + 1 :])
