"""Dials and listens at TCP and UNIX addresses.

An Interrupt ends every wait, also for name resolution. Every address of a name is tried. Errors name the URI and the
cause.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from corefw.channel import Interrupt
from corefw.errors import ChannelError, UriError
from corefw.net.socketfile import check_path, listen_at
from corefw.net.sockets import SocketChannel, SocketListener, check_peer_user, reason
from corefw.uri import MigrationUri, join_host_port

BACKLOG: Final = 256
"""Connections that may wait to be accepted: a migration may open 255 channels at once."""

_RETRY: Final = 0.05
"""Seconds between two attempts at a UNIX socket with a full backlog, which poll cannot wait for."""

_PORT_ATTEMPTS: Final = 20

_NOT_HERE: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENODEV})
"""Errors for an address of a name that this host does not have; it may have the others."""


@dataclass(frozen=True, slots=True)
class Address:
    """What a name was resolved to. `sockaddr` is as the socket module has it: host, port, ..."""

    family: int
    sockaddr: tuple[Any, ...]

    def with_port(self, port: int) -> tuple[Any, ...]:
        return (self.sockaddr[0], port, *self.sockaddr[2:])


# -- TCP -----------------------------------------------------------------------------------------------------------


def connect_tcp(host: str, port: int, uri: MigrationUri, interrupt: Interrupt) -> SocketChannel:
    """Connect to the first address of `host` ("": this host) that answers. Raises ChannelError, Interrupted."""
    if port == 0:
        raise ChannelError(f"{uri}: port 0 cannot be dialled (use the port that the listener reports)")
    failures: dict[str, str] = {}
    for address in resolve(host, port, uri, interrupt):
        try:
            return SocketChannel(_connected(address.family, address.sockaddr, interrupt), str(uri))
        except OSError as error:
            failures[str(address.sockaddr[0])] = reason(error)
    if len(set(failures.values())) == 1:
        raise ChannelError(f"{uri}: {next(iter(failures.values()))}")
    raise ChannelError(f"{uri}: " + "; ".join(f"at {address}: {why}" for address, why in failures.items()))


def listen_tcp(host: str, port: int, uri: MigrationUri) -> SocketListener:
    """Listen at every address of `host` ("" and "::": all of IPv4 and IPv6). For port 0 the listener's `uri` has the
    port that was free. Blocks while the name is resolved. Raises ChannelError."""
    if host:
        addresses = _lookup(host, port, uri)
    elif socket.has_dualstack_ipv6():
        addresses = [Address(socket.AF_INET6, ("::", port, 0, 0))]
    else:
        addresses = [Address(socket.AF_INET, ("0.0.0.0", port))]  # noqa: S104 - an empty host asks for all addresses
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        try:
            sockets = _listen_everywhere(addresses, port)
        except OSError as error:
            # The port that was free at the first address may be in use at the second: try another.
            if port or error.errno != errno.EADDRINUSE or attempt == _PORT_ATTEMPTS:
                raise ChannelError(f"{uri}: {reason(error)}") from None
        else:
            break
    real_port = sockets[0].getsockname()[1]
    return SocketListener(MigrationUri(uri.scheme, join_host_port(host, real_port)), sockets)


def _listen_everywhere(addresses: Sequence[Address], port: int) -> list[socket.socket]:
    """Listen at the same port of all addresses that this host has. Raises OSError, and leaves nothing open then."""
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        missing: OSError | None = None
        for address in addresses:
            sock = undo.enter_context(socket.socket(address.family, socket.SOCK_STREAM))
            try:
                _bind_tcp(sock, address.with_port(port))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                sock.close()
                missing = error
                continue
            sockets.append(sock)
            port = sock.getsockname()[1]
        if not sockets:
            assert missing
            raise missing
        undo.pop_all()
        return sockets


def _bind_tcp(sock: socket.socket, sockaddr: tuple[Any, ...]) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        # "::" is for every address, IPv4 too. Beside any other address IPv4 has a socket of its own.
        only = int(sockaddr[0] != "::" or not socket.has_dualstack_ipv6())
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    sock.bind(sockaddr)
    sock.listen(BACKLOG)


# -- names ---------------------------------------------------------------------------------------------------------


def resolve(host: str, port: int, uri: MigrationUri, interrupt: Interrupt) -> list[Address]:
    """Every address of a name. Raises ChannelError, Interrupted.

    The resolver cannot be interrupted, so it runs in a thread that is abandoned if the wait ends early.
    """
    if host.isascii() and host.isprintable():
        try:
            # As bytes: a str goes through IDNA, and loading its tables takes longer than dialling.
            return _getaddrinfo(host.encode(), port, socket.AI_NUMERICHOST)
        except OSError:
            pass  # it is a name, or _lookup reports what is wrong
    found: list[list[Address] | ChannelError] = []
    done = Interrupt()

    def look_up() -> None:
        try:
            found.append(_lookup(host, port, uri))
        except ChannelError as error:
            found.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=look_up, name="migfw-resolve", daemon=True)
    thread.start()
    try:
        interrupt.wait_for(done.fileno(), select.POLLIN)
    except BaseException:
        threading.Thread(target=_close_after, args=(done, thread), daemon=True).start()
        raise
    thread.join()
    done.close()
    if isinstance(found[0], ChannelError):
        raise found[0]
    return found[0]


def _close_after(done: Interrupt, thread: threading.Thread) -> None:
    thread.join()
    done.close()


def _lookup(host: str, port: int, uri: MigrationUri) -> list[Address]:
    try:
        return _getaddrinfo(host, port, 0)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ChannelError(f"{uri}: cannot find the host '{host}': {why[:1].lower()}{why[1:]}") from None


def _getaddrinfo(host: str | bytes, port: int, flags: int) -> list[Address]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    return [Address(family, sockaddr) for family, _, _, _, sockaddr in found]


# -- UNIX ----------------------------------------------------------------------------------------------------------


def check_unix_path(path: str, uri: MigrationUri) -> None:
    """Raise UriError if a socket cannot have this path. "@name" is a name in Linux's abstract space."""
    if path == "@":
        raise UriError(f"'{uri}': expected a name after @")
    check_path(path.removeprefix("@"), uri)


def _unix_address(path: str) -> bytes:
    raw = os.fsencode(path)
    return b"\0" + raw[1:] if path.startswith("@") else raw


def connect_unix(path: str, uri: MigrationUri, interrupt: Interrupt) -> SocketChannel:
    """Raises ChannelError, Interrupted."""
    while True:
        try:
            return SocketChannel(_connected(socket.AF_UNIX, _unix_address(path), interrupt), str(uri))
        except BlockingIOError:
            if interrupt.wait(_RETRY):
                interrupt.check()
        except FileNotFoundError:
            raise ChannelError(f"{uri}: no such file (is the destination listening?)") from None
        except OSError as error:
            raise ChannelError(f"{uri}: {reason(error)}") from None


def listen_unix(path: str, uri: MigrationUri, *, any_user: bool = False) -> SocketListener:
    """Listen at a path or, for "@name", in the abstract space. Raises ChannelError.

    A socket file has mode 0600. An abstract name has no mode, so accept() rejects users other than this one and root
    unless `any_user` is set.
    """
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            remove = None
            if path.startswith("@"):
                sock.bind(_unix_address(path))
                sock.listen(BACKLOG)
            else:
                remove = listen_at(sock, Path(path), BACKLOG)
        except OSError as error:
            raise ChannelError(f"{uri}: {reason(error)}") from None
        undo.pop_all()
    return SocketListener(uri, [sock], remove, None if any_user or remove else check_peer_user)


# -- both ----------------------------------------------------------------------------------------------------------


def _connected(family: int, sockaddr: tuple[Any, ...] | bytes, interrupt: Interrupt) -> socket.socket:
    """A connected socket. Raises Interrupted and OSError (BlockingIOError for a full backlog)."""
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        code = sock.connect_ex(sockaddr)
        if code == errno.EINPROGRESS:
            interrupt.wait_for(sock.fileno(), select.POLLOUT)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        interrupt.check()
        if code:
            raise OSError(code, os.strerror(code))
        if family != socket.AF_UNIX and sock.getsockname() == sock.getpeername():
            # The kernel chose the port that we dialled as our own, and connected the socket to itself.
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        undo.pop_all()
        return sock
