"""paramiko's Transport, mended where a migration needs more, and bounded everywhere.

The law: a wait here ends: with its result, with an error, or because `shut()` was called from another thread.
What is mended, each beside its reason: tunnels to UNIX sockets, messages in the midst of a key exchange, what becomes
of a channel that we closed, the volume after which keys change, and who hears of it when the connection is lost.

Threads: paramiko runs one of its own for each connection and calls `on_end` in it.
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
"""Bytes that may be under way to us on one channel; paramiko keeps them in memory until they are received. As much as
OpenSSH's: more would add to the downtime, since what is under way has to arrive before the guest can go on."""

MAX_PACKET: Final = 32 << 10
"""What every implementation has to accept (RFC 4253, 6.1), and what OpenSSH sends and takes in a tunnel."""

CIPHERS: Final = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
"""Preferred: encryption and integrity in one pass, half as much again as AES-CTR with HMAC."""

KEEPALIVE_SECONDS: Final = 15
NEGOTIATION_SECONDS: Final = 15.0
AUTHENTICATION_SECONDS: Final = 75.0
OPEN_SECONDS: Final = 30.0
STREAMLOCAL: Final = "direct-streamlocal@openssh.com"


class Carrier(Protocol):
    """What a connection runs over and has to end with it: a proxy command, a connection to a jump host."""

    def shut(self) -> None: ...


class _Packetizer(Packetizer):
    """Changes keys after 2**32 cipher blocks, as RFC 4344 (3.2) and OpenSSH have it: paramiko's 512 MiB would interrupt
    a migration every second."""

    REKEY_BYTES = (1 << 32) * 16


class Connection(paramiko.Transport):
    """One ssh connection. It ends when the last of its users has called `release()`; the maker is the first user.

    on_end   called in paramiko's thread when the connection has ended, for whatever reason
    """

    packetizer_class: type[Packetizer] = _Packetizer

    def __init__(self, sock: socket.socket | paramiko.Channel, carriers: tuple[Carrier, ...] = ()) -> None:
        """Owns `sock` and `carriers`."""
        super().__init__(
            sock, default_window_size=WINDOW, default_max_packet_size=MAX_PACKET, packetizer_class=self.packetizer_class
        )
        self.on_end: Callable[[], None] | None = None
        self.banner_timeout = self.handshake_timeout = NEGOTIATION_SECONDS
        self.auth_timeout = AUTHENTICATION_SECONDS
        self.channel_timeout = OPEN_SECONDS
        options = self.get_security_options()
        options.ciphers = sorted(options.ciphers, key=lambda cipher: cipher not in CIPHERS)  # stable: ours first
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
        """End the connection now, whoever waits in it or uses it. Idempotent; from any thread; never raises."""
        if isinstance(self.sock, socket.socket):
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)  # wakes who reads and writes there; close() alone does not
        with contextlib.suppress(Exception):  # whatever it meets, the rest has to go on
            self.close()
        with contextlib.suppress(OSError, EOFError):
            self.sock.close()
        # A handshake that never ended leaves a timer that would hold the whole process until it runs out.
        self.packetizer.complete_handshake()
        for carrier in self._carriers:
            carrier.shut()

    def run(self) -> None:
        """paramiko's thread. What it raises at its end is logged, not printed."""
        try:
            super().run()
        except Exception:
            log.debug("paramiko's thread failed", exc_info=True)
        finally:
            if self.on_end:
                self.on_end()

    # -- channels --------------------------------------------------------------------------------------------------

    def open_tcp(self, host: str, port: int) -> paramiko.Channel:
        """A tunnel to an address as the far host sees it. Raises paramiko.SSHException."""
        return self.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0))

    def open_unix(self, path: str) -> paramiko.Channel:
        """A tunnel to a UNIX socket on the far host. Raises paramiko.SSHException.

        open_channel() knows no such kind: it sends the request with nothing behind the common part.
        `_send_user_message` adds the rest.
        """
        with self._opening:
            self._unix_path = path
            try:
                return self.open_channel(STREAMLOCAL)
            finally:
                self._unix_path = None

    def unlinked(self, channel: paramiko.Channel) -> threading.Event:
        """Set once the far end has closed `channel` too, which is when it has handed over all that we sent."""
        return self._unlinked.setdefault(channel.get_id(), threading.Event())

    def _unlink_channel(self, chanid: int) -> None:
        super()._unlink_channel(chanid)  # type: ignore[misc]  # not in the stubs
        self._unlinked.setdefault(chanid, threading.Event()).set()

    def _send_user_message(self, data: paramiko.Message) -> None:
        """Two things more than paramiko's: the end of a request for a UNIX socket, and no waiting in paramiko's own
        thread. There it would wait for the end of a key exchange that only this thread can bring about."""
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
    """paramiko logs as errors, with tracebacks, what is told to the user in one line anyway: for debugging only."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def _quiet_log() -> str:
    """The name of the logger for our connections; the one of a program that uses paramiko itself is left alone."""
    name = f"{__name__}.paramiko"
    logger = logging.getLogger(name)
    if not any(isinstance(one, _Demoted) for one in logger.filters):
        logger.addFilter(_Demoted())
    return name
