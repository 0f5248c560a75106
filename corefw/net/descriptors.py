"""File descriptors that were passed to this process under a name (QMP `getfd`), for the URI `fd:NAME`.

The caller that takes a descriptor owns it. A new descriptor under a name that is in use replaces the old one, which is
closed, as in QEMU. Their number is limited, so that a client cannot use up the process's descriptors. Thread-safe.
"""

from __future__ import annotations

import os
import threading
from typing import Final

from corefw.errors import UsageError

MAX_DESCRIPTORS: Final = 64
MAX_NAME: Final = 255

_lock: Final = threading.Lock()
_named: Final[dict[str, int]] = {}


def put(name: str, fd: int) -> None:
    """Keep `fd` under `name` and own it from now on. If it cannot be kept, close it and raise UsageError."""
    try:
        with _lock:
            _check(name)
            old = _named.pop(name, None)
            _named[name] = fd
    except UsageError:
        os.close(fd)
        raise
    if old is not None:
        os.close(old)


def _check(name: str) -> None:
    if len(name) > MAX_NAME:
        raise UsageError(
            f"the name of a file descriptor has {len(name)} characters, expected {MAX_NAME} at most (use a shorter one)"
        )
    if name not in _named and len(_named) >= MAX_DESCRIPTORS:
        raise UsageError(
            f"cannot keep file descriptor '{name}': {MAX_DESCRIPTORS} are kept already, which is the limit"
            " (closefd closes those that are not needed)"
        )


def take(name: str) -> int | None:
    """Remove the descriptor with this name and give it to the caller; None if there is none."""
    with _lock:
        return _named.pop(name, None)


def discard(name: str) -> None:
    """Close the descriptor with this name, unless it was taken."""
    fd = take(name)
    if fd is not None:
        os.close(fd)


def peek(name: str) -> int | None:
    """The descriptor with this name, which stays here; None if there is none."""
    with _lock:
        return _named.get(name)
