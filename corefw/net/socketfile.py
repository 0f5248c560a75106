"""Create, probe and remove the files of UNIX sockets.

Invariant: a socket file appears, with mode 0600, once its socket listens. So a socket that refuses a connection is
stale, never early, and may be removed by any process that finds it. Anything else at the path is left alone. A listener
removes its own file unless another socket has taken the path.

Light to import: every command of the command line looks for engines with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Final

from corefw.errors import UriError

PATH_LIMIT: Final = 107
"""Bytes of a socket's path: sun_path has 108 and ends with a zero (an abstract name begins with it)."""

_ATTEMPTS: Final = 3
NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What link(2) fails with on a file system without hard links."""


def check_path(path: str, uri: object) -> None:
    """Raise UriError, which names the URI, if a socket cannot have this path."""
    length = len(os.fsencode(path))
    if length > PATH_LIMIT:
        raise UriError(f"'{uri}': the path has {length} bytes, a UNIX socket's can have {PATH_LIMIT}")
    if "\0" in path:
        raise UriError(f"'{uri}': a socket's path has no zero byte (an abstract name begins with @)")


class Occupant(Enum):
    """The kind of thing at a path."""

    NOBODY = auto()
    LISTENER = auto()
    OTHER = auto()
    """Something that is not a stream socket, or one that we may not dial, or a stale one that we may not remove."""


def occupant(path: Path) -> Occupant:
    """Find out what is at `path`; removes a stale socket. Neither blocks nor raises.

    A listener does not notice: the probe is a datagram socket, which cannot connect to a stream socket but gets another
    error where one listens. (A destination would take a real connection for its source.)
    """
    try:
        before = path.lstat()
        if not stat.S_ISSOCK(before.st_mode):
            return Occupant.OTHER
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            code = probe.connect_ex(os.fsencode(path))
        if code == errno.EPROTOTYPE:
            return Occupant.LISTENER
        if code not in (errno.ECONNREFUSED, errno.ENOENT):
            return Occupant.OTHER
        if os.path.samestat(path.lstat(), before):  # a new one may have taken its place since
            path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        pass  # its owner has removed it, or there never was one
    except OSError:
        return Occupant.OTHER
    return Occupant.NOBODY


def make_room(path: Path) -> None:
    """Remove a stale socket. Raises OSError if something else is in the way of listening at `path`."""
    found = occupant(path)
    if found is Occupant.LISTENER:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if found is Occupant.OTHER:
        raise OSError(errno.EEXIST, "it exists and is not a stale socket of yours (remove it, or choose another path)")


def listen_at(sock: socket.socket, path: Path, backlog: int) -> Callable[[], None]:
    """Listen at a socket file; returns a function that removes it. Raises OSError.

    The socket listens under another name first. So a client that waits for the file can connect as soon as it appears,
    and a file that refuses connections is always stale.
    """
    early = f".{secrets.token_hex(8)}"
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)  # before bind: the file never has another mode
        sock.bind(f"/proc/self/fd/{folder}/{early}")  # so the folder's path may be as long as that of the file
        try:
            ours = os.stat(early, dir_fd=folder, follow_symlinks=False)
            sock.listen(backlog)
            _put_in_place(folder, early, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(early, dir_fd=folder)
    finally:
        os.close(folder)
    return _remover(path.absolute(), ours)


def _put_in_place(folder: int, early: str, path: Path) -> None:
    for _ in range(_ATTEMPTS):
        try:
            return os.link(early, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            make_room(path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # If two processes start to listen here at once, the later one gets the name.
            make_room(path)
            return os.rename(early, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _remover(file: Path, ours: os.stat_result) -> Callable[[], None]:
    """A function that removes the socket file unless another has taken its place."""

    def remove() -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(file.lstat(), ours):
                file.unlink()

    return remove
