"""Connects to a destination and logs in.

Every step has a time limit and ends at once when the Interrupt is set. Every failure is one line with the URI, the host
where it happened, and what to do. Jump hosts (ProxyJump) are checked as strictly as the last one.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import paramiko

from corefw.channel import Interrupt
from corefw.errors import ChannelError, Interrupted, UriError
from corefw.net.dialing import resolve
from corefw.net.sockets import KEEPALIVE, reason
from corefw.uri import MigrationUri, join_host_port
from corefw_transport_ssh.address import SshAddress, parse_authority
from corefw_transport_ssh.config import Destination, find_destination
from corefw_transport_ssh.connection import KEEPALIVE_SECONDS, NEGOTIATION_SECONDS, Connection
from corefw_transport_ssh.credentials import Credentials
from corefw_transport_ssh.known_hosts import HostIdentity, check_host_key, known_kinds, read_known_hosts

MAX_JUMPS: Final = 8
SILENCE_MILLISECONDS: Final = 60_000
"""Time without an acknowledgement from the remote host after which the kernel breaks the connection."""

SIGNATURES: Final = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}
"""Kind of host key -> algorithms to request; other kinds stand for themselves."""


def dial(uri: MigrationUri, address: SshAddress, interrupt: Interrupt) -> Connection:
    """Connect to the URI's sshd and log in. Raises ChannelError, Interrupted."""
    return _dial(uri, find_destination(address.user, address.host, address.port), interrupt, 0)


def _dial(
    uri: MigrationUri, destination: Destination, interrupt: Interrupt, depth: int, via: Connection | None = None
) -> Connection:
    """Dial a host. `via` is the connection to the previous host; ownership passes to this function."""
    connection = _reach(uri, destination, interrupt, depth, via)
    try:
        with shut_by(interrupt, connection.shut):
            _negotiate(uri, connection, destination)
            _log_in(uri, connection, destination)
        connection.set_keepalive(KEEPALIVE_SECONDS)
    except BaseException:
        connection.shut()
        raise
    return connection


@contextlib.contextmanager
def shut_by(interrupt: Interrupt, shut: Callable[[], None]) -> Iterator[None]:
    """Context in which `interrupt` calls `shut`; a failure caused by that raises Interrupted."""
    done = Interrupt()

    def watch() -> None:
        try:
            interrupt.wait_for(done.fileno(), select.POLLIN)
        except Interrupted:
            shut()

    watcher = threading.Thread(target=watch, name="migfw-ssh-interrupt", daemon=True)
    watcher.start()
    try:
        yield
    except Exception:
        interrupt.check()
        raise
    finally:
        done.set()
        watcher.join()
        done.close()
    interrupt.check()


# -- the route -------------------------------------------------------------------------------------------------


def _reach(
    uri: MigrationUri, destination: Destination, interrupt: Interrupt, depth: int, via: Connection | None
) -> Connection:
    if via is None and destination.proxy_jump:
        via = _jump(uri, destination, interrupt, depth)
    if via is not None:
        try:
            with shut_by(interrupt, via.shut):
                return Connection(via.open_tcp(destination.host, destination.port), (via,))
        except (OSError, EOFError, paramiko.SSHException) as error:
            via.shut()
            raise ChannelError(f"{uri}: {_place(destination)} cannot be reached from the jump host: {error}") from None
        except BaseException:
            via.shut()
            raise
    if destination.proxy_command:
        return _ProxyCommand.start(uri, destination.proxy_command)
    return Connection(_connect(uri, destination, interrupt))


def _jump(uri: MigrationUri, destination: Destination, interrupt: Interrupt, depth: int) -> Connection:
    """Connect to the last of the jump hosts."""
    if depth >= MAX_JUMPS:
        raise ChannelError(
            f"{uri}: more than {MAX_JUMPS} jump hosts: does ProxyJump of '{destination.alias}' go in a circle?"
        )
    via: Connection | None = None
    for hop in destination.proxy_jump:
        try:
            user, host, port = parse_authority(hop.removeprefix("ssh://"), hop)
        except UriError as error:
            raise ChannelError(f"{uri}: ProxyJump of '{destination.alias}': {error}") from None
        via = _dial(uri, find_destination(user, host, port), interrupt, depth + 1, via)
    assert via
    return via


class _ProxyCommand:
    """A ProxyCommand: a shell command whose standard input and output are one end of a socket pair.

    paramiko's own class never notices that the command has ended.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, uri: MigrationUri, command: str) -> Connection:
        ours, its = socket.socketpair()
        with its:
            try:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", f"exec {command}"],
                    stdin=its.fileno(),
                    stdout=its.fileno(),
                    stderr=subprocess.DEVNULL,
                )
            except OSError as error:
                ours.close()
                raise ChannelError(f"{uri}: cannot run ProxyCommand '{command}': {error.strerror}") from None
        return Connection(ours, (cls(process),))

    def shut(self) -> None:
        self._process.kill()
        self._process.wait()


def _connect(uri: MigrationUri, destination: Destination, interrupt: Interrupt) -> socket.socket:
    """Open a TCP connection to the first address that answers. Raises ChannelError, Interrupted."""
    failures: dict[str, None] = {}
    for address in resolve(destination.host, destination.port, uri, interrupt):
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            _connect_to(sock, address.sockaddr, destination.connect_seconds, interrupt)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MILLISECONDS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            return sock
        except OSError as error:
            sock.close()
            refused = error.errno == errno.ECONNREFUSED
            failures["connection refused (is sshd running there?)" if refused else reason(error)] = None
        except BaseException:
            sock.close()
            raise
    raise ChannelError(f"{uri}: cannot reach {_place(destination)}: {'; '.join(failures)}")


def _connect_to(sock: socket.socket, sockaddr: tuple[object, ...], seconds: float, interrupt: Interrupt) -> None:
    sock.setblocking(False)
    code = sock.connect_ex(sockaddr)
    if code == errno.EINPROGRESS:
        if not interrupt.wait_for(sock.fileno(), select.POLLOUT, seconds):
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:.0f} s")
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, "")


def _place(destination: Destination) -> str:
    return join_host_port(destination.host, destination.port)


# -- authentication ----------------------------------------------------------------------------------


def _negotiate(uri: MigrationUri, connection: Connection, destination: Destination) -> None:
    """Negotiate the encrypted connection and check the host key."""
    identity = HostIdentity(destination.host, destination.port, destination.key_name)
    known = read_known_hosts(destination.known_hosts)
    options = connection.get_security_options()
    wanted = [name for kind in known_kinds(identity, known) for name in SIGNATURES.get(kind, (kind,))]
    first = [name for name in wanted if name in options.key_types]
    options.key_types = (*first, *(name for name in options.key_types if name not in first))
    try:
        connection.start_client(timeout=2 * NEGOTIATION_SECONDS)
        key = connection.get_remote_server_key()
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise ChannelError(f"{uri}: {_no_ssh(destination, error)}") from None
    try:
        check_host_key(identity, key.get_name(), key.asbytes(), known, destination.known_hosts)
    except ChannelError as error:
        raise ChannelError(f"{uri}: {error}") from None


_NO_BANNER: Final = ("banner", "Indecipherable protocol version")


def _no_ssh(destination: Destination, error: Exception) -> str:
    what = f"ProxyCommand '{destination.proxy_command}'" if destination.proxy_command else _place(destination)
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return f"{what} and migfw have no algorithm in common: {error}"
    if isinstance(error, EOFError) or not str(error) or any(word in str(error) for word in _NO_BANNER):
        return f"{what} does not answer like an sshd (is it one? does it refuse connections?)"
    return f"{what} failed at the ssh handshake: {error}"


def _log_in(uri: MigrationUri, connection: Connection, destination: Destination) -> None:
    credentials = Credentials(destination)
    deadline = time.monotonic() + connection.auth_timeout
    accepted: list[str] = []
    try:
        for key in credentials:
            try:
                still_wanted = connection.auth_publickey(destination.user, key)
            except paramiko.BadAuthenticationType as error:
                accepted = error.allowed_types
                break
            except paramiko.AuthenticationException:
                if not connection.is_active():
                    credentials.unusable.append("the server ended the connection after too many keys (IdentitiesOnly?)")
                    break
                if time.monotonic() > deadline:
                    break
                continue
            if not still_wanted:
                return
            accepted = still_wanted
            break
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise ChannelError(f"{uri}: the connection to {_place(destination)} was lost at log-in: {error}") from None
    finally:
        credentials.close()
    raise ChannelError(f"{uri}: {_not_let_in(destination, credentials, accepted)}")


def _not_let_in(destination: Destination, credentials: Credentials, accepted: list[str]) -> str:
    offered = (
        ", ".join(credentials.offered) or "no key (there is none in ssh-agent and none that can be used in ~/.ssh)"
    )
    text = f"{_place(destination)} does not let '{destination.user}' in; offered: {offered}"
    if credentials.unusable:
        text += f"; not offered: {', '.join(credentials.unusable)}"
    if accepted:
        text += f"; the server wants: {', '.join(accepted)}"
    return text
