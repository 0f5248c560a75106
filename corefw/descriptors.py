"""File descriptors that somebody handed to this process under a name (QMP `getfd`), for the URI `fd:NAME`.

The law: whoever takes a descriptor owns it and closes it; one that is put under a taken name replaces the old one,
which is closed, as QEMU does. Thread-safe.
"""

from __future__ import annotations

import os
import threading
from typing import Final

_lock: Final = threading.Lock()
_named: Final[dict[str, int]] = {}


def put(name: str, fd: int) -> None:
    """Keep `fd` under `name`; the caller gives it away."""
    with _lock:
        old = _named.pop(name, None)
        _named[name] = fd
    if old is not None:
        os.close(old)


def take(name: str) -> int | None:
    """Remove and return the descriptor with this name; it is the caller's now."""
    with _lock:
        return _named.pop(name, None)


def peek(name: str) -> int | None:
    """The descriptor with this name, to look at: it stays where it is."""
    with _lock:
        return _named.get(name)
