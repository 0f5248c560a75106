"""SshTransport: connect() opens a tunnel, listen() has the remote sshd listen for us, log_in() runs commands there.

Invariant: each dialed channel has a connection of its own, so that one cannot slow down or break another. Accepted
channels share the listener's connection, which lives until the last of them is closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from typing import Final

import paramiko

from corefw.channel import Channel, Interrupt, Listener, RemoteHost, Transport, TransportContext, TransportFeatures
from corefw.errors import ChannelError
from corefw.uri import MigrationUri, TcpAddress, UnixAddress, check_dialled_port, join_host_port
from corefw_transport_ssh.address import SshAddress, Target, parse_address
from corefw_transport_ssh.channel import FAILURES, SshChannel
from corefw_transport_ssh.connection import OPEN_SECONDS, Connection
from corefw_transport_ssh.dial import dial, shut_by
from corefw_transport_ssh.remote import SshHost

BACKLOG: Final = 16
"""Peers waiting to be accepted; each may already have sent a window of data. More are refused."""

CANCEL_SECONDS: Final = 2.0

_PROHIBITED: Final = 1
_CONNECT_FAILED: Final = 2

_UNIX_REFUSED: Final = (
    "cannot connect to {target}: nothing listens there, or it does not allow that (AllowStreamLocalForwarding)"
)

_REFUSALS: Final[dict[tuple[type[Target], int], str]] = {
    (TcpAddress, _PROHIBITED): "does not allow a tunnel to {target} (AllowTcpForwarding, PermitOpen)",
    (TcpAddress, _CONNECT_FAILED): "cannot connect to {target} (is the destination listening there?)",
    (UnixAddress, _PROHIBITED): _UNIX_REFUSED,
    (UnixAddress, _CONNECT_FAILED): _UNIX_REFUSED,
}
"""OpenSSH does not distinguish the two for a UNIX socket."""


class SshTransport(Transport):
    """ssh://[USER@]HOST[:PORT]/tcp:HOST:PORT, ssh://…/unix:PATH"""

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        super().__init__(uri, context)
        self._address = parse_address(uri)
        can_wait = isinstance(self._address.target, TcpAddress)
        self.features = TransportFeatures(return_path=True, multi_channel=True, incoming=can_wait)

    def check_outgoing(self) -> None:
        super().check_outgoing()
        if isinstance(self._address.target, TcpAddress):
            check_dialled_port(self._address.target.port, str(self.uri))

    def connect(self, interrupt: Interrupt) -> Channel:
        target = self._address.target
        if isinstance(target, TcpAddress) and target.port == 0:
            raise ChannelError(f"{self.uri}: port 0 cannot be dialled (use the port that the listener reports)")
        connection = dial(self.uri, self._address, interrupt)
        try:
            with shut_by(interrupt, connection.shut):
                channel = self._open(connection, target)
        except BaseException:
            connection.shut()
            raise
        return SshChannel(channel, connection, str(self.uri))

    def log_in(self, interrupt: Interrupt) -> RemoteHost:
        return SshHost(self._address.authority, dial(self.uri, self._address, interrupt))

    def _open(self, connection: Connection, target: Target) -> paramiko.Channel:
        try:
            if isinstance(target, UnixAddress):
                return connection.open_unix(target.path)
            return connection.open_tcp(target.host or "localhost", target.port)
        except paramiko.ChannelException as error:
            said = _REFUSALS.get((type(target), error.code), f"refuses a tunnel to {{target}}: {error.text}")
            raise ChannelError(f"{self.uri}: the remote sshd {said.format(target=target)}") from None
        except FAILURES as error:
            raise ChannelError(f"{self.uri}: the ssh connection was lost: {error}") from None

    def listen(self) -> Listener:
        target = self._address.target
        if not isinstance(target, TcpAddress):
            raise ChannelError(f"{self.uri}: cannot listen at a UNIX socket on a remote host (use tcp:HOST:PORT)")
        never = Interrupt()
        try:
            connection = dial(self.uri, self._address, never)
        finally:
            never.close()
        return SshListener(self.uri, self._address, target, connection)


class SshListener(Listener):
    """A port on the remote host. Its sshd forwards each connection to us; paramiko's thread queues them."""

    def __init__(self, uri: MigrationUri, address: SshAddress, target: TcpAddress, connection: Connection) -> None:
        """Takes over the caller's use of `connection`, even on failure. Raises ChannelError."""
        self._connection = connection
        self._lock = threading.Lock()
        self._accepting = threading.Lock()
        self._waiting: deque[tuple[paramiko.Channel, str]] = deque()
        self._arrived = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._target = target
        connection.on_end = self._wake
        limit = threading.Timer(OPEN_SECONDS, connection.shut)  # paramiko would wait for the answer without a limit
        limit.daemon = True
        limit.start()
        try:
            port = connection.request_port_forward(target.host, target.port, self._queue)
        except FAILURES:
            self.close()
            raise ChannelError(
                f"{uri}: the remote sshd does not listen at {target} for us "
                "(is the port in use there? AllowTcpForwarding? PermitListen?)"
            ) from None
        finally:
            limit.cancel()
        self._target = TcpAddress(target.host, port)
        self.uri = address.with_target(self._target)

    def accept(self, interrupt: Interrupt) -> Channel:
        with self._accepting:
            while (channel := self._take()) is None:
                if not self._connection.is_active():
                    raise ChannelError(f"{self.uri}: the ssh connection was lost")
                interrupt.wait_for(self._arrived, select.POLLIN)
            return channel

    def _take(self) -> Channel | None:
        """The next peer that waits. Raises ChannelError once the listener is closed."""
        with self._lock:
            if self._closed:
                raise ChannelError(f"{self.uri}: is no longer listening")
            if self._waiting:
                channel, origin = self._waiting.popleft()
                self._connection.retain()
                return SshChannel(channel, self._connection, f"{self.uri} from {origin}")
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._arrived)
            return None

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            turned_away = [channel for channel, _ in self._waiting]
            self._waiting.clear()
            os.eventfd_write(self._arrived, 1)
        with self._accepting:  # not while accept() polls it: its number may be another file's at once
            os.close(self._arrived)
        # In a thread, because it blocks if nothing gets through any more.
        thread = threading.Thread(target=self._cancel, args=(turned_away,), name="migfw-ssh-cancel", daemon=True)
        thread.start()
        thread.join(CANCEL_SECONDS)
        self._connection.release()

    def _cancel(self, turned_away: list[paramiko.Channel]) -> None:
        with contextlib.suppress(*FAILURES):
            for channel in turned_away:
                channel.close()
            self._connection.cancel_port_forward(self._target.host, self._target.port)

    def _queue(self, channel: paramiko.Channel, origin: tuple[str, int], _: tuple[str, int]) -> None:
        with self._lock:
            if not self._closed and len(self._waiting) < BACKLOG:
                self._waiting.append((channel, join_host_port(*origin)))
                os.eventfd_write(self._arrived, 1)
                return
        channel.close()

    def _wake(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._arrived, 1)
