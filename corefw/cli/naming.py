"""What an engine is called, and where its QMP server listens."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import Final

from corefw.closing import Closing
from corefw.errors import UsageError
from corefw.net.socketfile import Occupant, make_room, occupant
from corefw.net.sockets import reason
from corefw.qmp.address import QmpAddress, UnixAddress, named_address, parse_address

_LONGEST: Final = 40
"""Characters of a name that was made up; a name given by --name may be longer."""


class Claim(Closing):
    """The name and the QMP address of an engine that is about to start.

    While it is open, no other engine of this user gets the name. Close it once the QMP socket is in place: from then on
    the socket is what shows that the name is taken.
    """

    def __init__(self, name: str, address: QmpAddress, lock: tuple[Path, int] | None = None) -> None:
        self.name: Final = name
        self.address: Final = address
        self._lock = lock

    def close(self) -> None:
        """Idempotent; does not raise."""
        if self._lock is not None:
            path, fd = self._lock
            self._lock = None
            with contextlib.suppress(OSError):
                path.unlink()  # before the lock goes: whoever locks this file afterwards sees that it is not the path's
            os.close(fd)


def claim(name: str | None, qmp: str | None, program: str) -> Claim:
    """Claim a name and an address for a new engine.

    What was given must be free; a name made from `program` gets a number where it is taken. Raises UsageError.
    """
    if qmp is not None:
        address = parse_address(qmp)
        if isinstance(address, UnixAddress):
            try:
                make_room(Path(address.path))
            except OSError as error:
                raise UsageError(f"cannot listen at '{address}': {reason(error)}") from None
        return Claim(suggest(program) if name is None else name, address)
    if name is not None:
        claimed = _claim(name)
        if claimed is None:
            raise UsageError(
                f"an engine named '{name}' is already running: choose another --name, or end it with 'migfw quit'"
            )
        return claimed
    suggested, number = suggest(program), 1
    while (claimed := _claim(suggested if number == 1 else f"{suggested}-{number}")) is None:
        number += 1
    return claimed


def _claim(name: str) -> Claim | None:
    """None where the name is taken. Raises UsageError for what cannot be a name, or cannot be claimed."""
    address = named_address(name)
    socket = Path(address.path)
    try:
        fd = _lock(socket.with_suffix(".lock"))
        if fd is None:
            return None
        claimed = Claim(name, address, (socket.with_suffix(".lock"), fd))
        # Only now: an engine that held the lock until a moment ago has its socket in place.
        found = occupant(socket)
        if found is Occupant.NOBODY:
            return claimed
        claimed.close()
        if found is Occupant.LISTENER:
            return None
        make_room(socket)
    except OSError as error:
        raise UsageError(f"cannot listen at '{address}': {reason(error)}") from None
    return _claim(name)


def _lock(path: Path) -> int | None:
    """A descriptor of the locked file, made where it is missing; None while another process has it. Raises OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.lstat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its owner removed it in between


def suggest(program: str) -> str:
    """ "sims/heat.py:Heat" -> "heat", "package.module:Class" -> "class", "stress" -> "stress"."""
    path, _, attribute = program.partition(":")
    word = Path(path).stem if path.endswith(".py") else (attribute or path)
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:_LONGEST] or "guest"
