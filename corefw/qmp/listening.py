"""Sockets to wait for clients on.

The law: a UNIX socket appears at its path when it is listening already, with mode 0600 from its first moment; a live
one that is there is left alone, a dead one replaced, and nothing but a socket is ever removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from corefw.errors import ChannelError, UsageError
from corefw.qmp.address import MAX_PATH, QmpAddress, TcpAddress, UnixAddress, remove_stale

BACKLOG: Final = 64


@dataclass(frozen=True, slots=True)
class Listening:
    """`address` is what clients dial; `close` ends it and removes the file."""

    socket: socket.socket
    address: QmpAddress
    close: Callable[[], None]


def listen(address: QmpAddress) -> Listening:
    """Raises UsageError (somebody else is there), ChannelError (cannot listen there)."""
    return _listen_unix(address) if isinstance(address, UnixAddress) else _listen_tcp(address)


def _listen_unix(address: UnixAddress) -> Listening:
    path = Path(address.path)
    early = path.with_name(f".{secrets.token_hex(4)}")
    if len(os.fsencode(early)) > MAX_PATH:
        raise UsageError(f"cannot listen at '{address}': the directory's path is too long for a socket")
    sock = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(sock.fileno(), 0o600)  # bind() takes the file's mode from the socket's: no moment with another one
        sock.bind(str(early))
        try:
            sock.listen(BACKLOG)
            _put_in_place(early, path, address)
        finally:
            early.unlink()
    except OSError as error:
        sock.close()
        raise ChannelError(f"cannot listen at '{address}': {error.strerror}") from None
    except UsageError:
        sock.close()
        raise
    return Listening(sock, address, _remover(sock, path, path.lstat().st_ino))


def _put_in_place(early: Path, path: Path, address: UnixAddress) -> None:
    try:
        path.hardlink_to(early)
    except FileExistsError:
        if remove_stale(path):
            raise UsageError(
                f"cannot listen at '{address}': somebody does already (end it, or choose another name or path)"
            ) from None
        try:
            path.hardlink_to(early)
        except FileExistsError:
            raise UsageError(
                f"cannot listen at '{address}': there is something that is no dead socket of yours (remove it, or "
                "choose another path)"
            ) from None


def _remover(sock: socket.socket, path: Path, inode: int) -> Callable[[], None]:
    def close() -> None:
        sock.close()
        with contextlib.suppress(OSError):
            if path.lstat().st_ino == inode:
                path.unlink()

    return close


def _listen_tcp(address: TcpAddress) -> Listening:
    """The first of the host's addresses that can be had; port 0 takes a free one."""
    try:
        found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ChannelError(f"cannot listen at '{address}': {error.strerror}") from None
    problem: OSError | None = None
    for family, kind, protocol, _, where in found:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            problem = error
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            problem = error
            continue
        host = address.host or str(where[0])
        return Listening(sock, TcpAddress(host, sock.getsockname()[1]), sock.close)
    raise ChannelError(f"cannot listen at '{address}': {problem.strerror if problem else 'the host has no address'}")
