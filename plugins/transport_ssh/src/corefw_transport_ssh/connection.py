"""paramiko's Transport with fixes that a migration needs, and with limits on every wait.

Every wait ends with a result, with an error, or because another thread called `shut()`. The fixes, each explained in
place: tunnels to UNIX sockets, messages during a key exchange, the fate of a channel that we closed, the volume after
which keys are renegotiated, and notification when the connection is lost.

Threads: paramiko runs one thread per connection, which calls `on_end`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Final, Protocol

import paramiko
from paramiko.common import cMSG_CHANNEL_OPEN
from paramiko.packet import Packetizer

log = logging.getLogger(__name__)

WINDOW: Final = 2 << 20
"""Receive window of a channel in bytes; paramiko keeps them in memory until they are received. The same as OpenSSH's:
more would add to the downtime, because data in flight has to arrive before the guest can resume."""

MAX_PACKET: Final = 32 << 10
"""The size that every implementation must accept (RFC 4253, 6.1), and that OpenSSH uses in a tunnel."""

CIPHERS: Final = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
"""Preferred ciphers: encryption and integrity in one pass, 1.5 times as fast as AES-CTR with HMAC."""

KEEPALIVE_SECONDS: Final = 15
NEGOTIATION_SECONDS: Final = 15.0
AUTHENTICATION_SECONDS: Final = 75.0
OPEN_SECONDS: Final = 30.0
STREAMLOCAL: Final = "direct-streamlocal@openssh.com"


class Carrier(Protocol):
    """What a connection runs over and closes with it: a proxy command, a connection to a jump host."""

    def shut(self) -> None: ...


class _Packetizer(Packetizer):
    """Renegotiates keys after 2**32 cipher blocks, like RFC 4344 (3.2) and OpenSSH: paramiko's 512 MiB would interrupt
    a migration every second."""

    REKEY_BYTES = (1 << 32) * 16


class Connection(paramiko.Transport):
    """One ssh connection. It ends when the last of its users has called `release()`; its creator is the first user.

    on_end   called in paramiko's thread when the connection has ended, for whatever reason
    """

    packetizer_class: type[Packetizer] = _Packetizer

    def __init__(self, sock: socket.socket | paramiko.Channel, carriers: tuple[Carrier, ...] = ()) -> None:
        """Takes ownership of `sock` and `carriers`."""
        super().__init__(
            sock, default_window_size=WINDOW, default_max_packet_size=MAX_PACKET, packetizer_class=self.packetizer_class
        )
        self.on_end: Callable[[], None] | None = None
        self.banner_timeout = self.handshake_timeout = NEGOTIATION_SECONDS
        self.auth_timeout = AUTHENTICATION_SECONDS
        self.channel_timeout = OPEN_SECONDS
        options = self.get_security_options()
        options.ciphers = sorted(options.ciphers, key=lambda cipher: cipher not in CIPHERS)  # stable sort: ours first
        self.set_log_channel(_quiet_log())
        self._carriers = carriers
        self._users = 1
        self._users_lock = threading.Lock()
        self._opening = threading.Lock()
        self._unix_path: str | None = None
        self._deferred: list[paramiko.Message] = []
        self._unlinked: dict[int, threading.Event] = {}

    # -- how long it lives -----------------------------------------------------------------------------------------

    @property
    def shared(self) -> bool:
        """Whether it has more than one user."""
        return self._users > 1

    def retain(self) -> None:
        with self._users_lock:
            self._users += 1

    def release(self) -> None:
        with self._users_lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.shut()

    def shut(self) -> None:
        """End the connection now, even if others use it. Idempotent; from any thread; never raises."""
        if isinstance(self.sock, socket.socket):
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)  # wakes blocked readers and writers; close() alone does not
        with contextlib.suppress(Exception):  # the remaining steps must run whatever this raises
            self.close()
        with contextlib.suppress(OSError, EOFError):
            self.sock.close()
        # An unfinished handshake leaves a timer that would keep the process alive until it expires.
        self.packetizer.complete_handshake()
        for carrier in self._carriers:
            carrier.shut()

    def run(self) -> None:
        """The body of paramiko's thread. An exception at its end is logged, not printed."""
        try:
            super().run()
        except Exception:
            log.debug("paramiko's thread failed", exc_info=True)
        finally:
            if self.on_end:
                self.on_end()

    # -- channels --------------------------------------------------------------------------------------------------

    def open_tcp(self, host: str, port: int) -> paramiko.Channel:
        """Open a tunnel to an address as seen from the remote host. Raises paramiko.SSHException."""
        return self.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0))

    def open_unix(self, path: str) -> paramiko.Channel:
        """Open a tunnel to a UNIX socket on the remote host. Raises paramiko.SSHException.

        open_channel() does not support this kind: it sends the request with only the common part, and
        `_send_user_message` appends the rest.
        """
        with self._opening:
            self._unix_path = path
            try:
                return self.open_channel(STREAMLOCAL)
            finally:
                self._unix_path = None

    def unlinked(self, channel: paramiko.Channel) -> threading.Event:
        """An event that is set once the remote end has closed `channel` too, having forwarded everything that we
        sent."""
        return self._unlinked.setdefault(channel.get_id(), threading.Event())

    def _unlink_channel(self, chanid: int) -> None:
        super()._unlink_channel(chanid)  # type: ignore[misc]  # not in the stubs
        self._unlinked.setdefault(chanid, threading.Event()).set()

    def _send_user_message(self, data: paramiko.Message) -> None:
        """Extend paramiko's method: append to requests for a UNIX socket, and do not wait in paramiko's own thread,
        where it would wait for the end of a key exchange that only this thread can complete."""
        if self._unix_path is not None and data.asbytes().startswith(_STREAMLOCAL_OPEN):
            data.add_string(self._unix_path)
            data.add_string("")  # reserved
            data.add_int(0)  # reserved
        if threading.current_thread() is self and not self.clear_to_send.is_set():
            self._deferred.append(data)
            return
        super()._send_user_message(data)  # type: ignore[misc]  # not in the stubs

    def _parse_newkeys(self, message: paramiko.Message) -> None:
        super()._parse_newkeys(message)  # type: ignore[misc]  # not in the stubs
        deferred, self._deferred = self._deferred, []
        for data in deferred:
            self._send_user_message(data)


def _streamlocal_open() -> bytes:
    beginning = paramiko.Message()
    beginning.add_byte(cMSG_CHANNEL_OPEN)
    beginning.add_string(STREAMLOCAL)
    return beginning.asbytes()


_STREAMLOCAL_OPEN: Final = _streamlocal_open()


class _Demoted(logging.Filter):
    """Demotes paramiko's errors and tracebacks to debug messages: the user gets them as one line anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def _quiet_log() -> str:
    """Name of the logger for our connections; the logger of a program that uses paramiko itself is left alone."""
    name = f"{__name__}.paramiko"
    logger = logging.getLogger(name)
    if not any(isinstance(one, _Demoted) for one in logger.filters):
        logger.addFilter(_Demoted())
    return name
