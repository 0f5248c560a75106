"""One tunnel as a Channel.

Invariant: only the remote sshd can end a stream; a tunnel or connection that is lost in any other way raises. Sending
blocks on the remote window, so memory stays bounded: at most WINDOW bytes wait here to be received, twice that while
they are moved.

Threads: as for Channel. close() continues in a thread of its own until the remote side has received everything.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final

import paramiko

from corefw.channel import Buffer, Channel
from corefw.errors import ChannelError, Interrupted
from corefw_transport_ssh.connection import WINDOW, Connection

TICK: Final = 0.2
"""Seconds after which a blocked call checks whether it was aborted (most are woken at once)."""

ABORT_SECONDS: Final = 1.0
"""Seconds for an aborted send on a shared connection to notice before the whole connection is closed."""

CLOSE_SECONDS: Final = 2.0
"""Seconds that close() waits for the remote side; after that a thread waits."""

LINGER_SECONDS: Final = 60.0

FAILURES: Final = (OSError, EOFError, paramiko.SSHException)
"""Exceptions that paramiko raises when a connection is lost."""


class SshChannel(Channel):
    """A Channel over a paramiko channel, which it owns. It is one user of its connection."""

    def __init__(self, channel: paramiko.Channel, connection: Connection, peer: str) -> None:
        self.peer = peer
        self.has_return_path = True
        self._channel = channel
        self._connection = connection
        self._held = memoryview(b"")
        self._ended = False
        self._aborted = False
        self._closed = False
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        channel.settimeout(TICK)

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, *parts: Buffer) -> None:
        with self._sending:
            for packet in _packets(parts, self._channel.out_max_packet_size - 64):  # the space that paramiko reports
                self._send_packet(packet)
            self._check()
            if not self._connection.is_active():  # as in send_eof
                raise self._broken()

    def _send_packet(self, packet: bytes) -> None:
        while packet:
            self._check()
            try:
                sent = self._channel.send(packet)
            except TimeoutError:
                continue
            except FAILURES:
                raise self._broken() from None
            if sent == 0:
                raise self._broken()
            packet = packet[sent:]

    def send_eof(self) -> None:
        self._check()
        if self._channel.closed:  # the sshd closes only after our end, unless it could not forward what we sent
            raise self._broken()
        try:
            self._channel.shutdown_write()
        except FAILURES:
            raise self._broken() from None
        if not self._connection.is_active():  # paramiko silently drops data sent over a lost connection
            raise self._broken()

    # -- receiving -------------------------------------------------------------------------------------------------

    def receive_into(self, view: memoryview) -> int:
        assert len(view), "receive_into an empty view"
        while not self.wait_readable(TICK):
            pass
        count = min(len(view), len(self._held))
        view[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def wait_readable(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        self._check_usable()  # no more, but data that arrived before a send failed can still be received
        while not self._held and not self._ended:
            left = max(0.0, deadline - time.monotonic())
            # The sending thread uses the same timeout: never let it sleep longer than a tick.
            self._channel.settimeout(min(left, TICK))
            try:
                self._fill()
            except TimeoutError:
                self._check()
                if left == 0.0:
                    return False
            finally:
                self._channel.settimeout(TICK)
        return True

    def _fill(self) -> None:
        """Take all received data from paramiko. Raises TimeoutError, ChannelError."""
        try:
            # All at once: paramiko moves the remainder to the front of its buffer each time.
            data = self._channel.recv(2 * WINDOW)
        except TimeoutError:
            raise
        except FAILURES:
            raise self._broken() from None
        self._check_usable()
        if data:
            self._held = memoryview(data)
        elif self._channel.eof_received:
            self._ended = True
        else:
            raise self._broken()

    # -- ending ----------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        with self._lock:
            if self._aborted or self._closed:
                return
            self._aborted = True
        if not self._connection.shared:
            self._connection.shut()
            return
        self._channel.in_buffer.close()  # wakes a blocked receive
        if self._sending.acquire(timeout=ABORT_SECONDS):
            self._sending.release()
        else:
            self._connection.shut()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._held = memoryview(b"")
        # Not a daemon thread: the program may end right after close(), and sent data must still arrive.
        thread = threading.Thread(target=self._finish, name="migfw-ssh-close")
        thread.start()
        thread.join(CLOSE_SECONDS)

    def _finish(self) -> None:
        """Close the tunnel and wait until the remote sshd has forwarded everything and closed it too."""
        try:
            threading.Thread(target=self._say_close, name="migfw-ssh-close", daemon=True).start()
            gone = self._connection.unlinked(self._channel)
            deadline = time.monotonic() + (0.0 if self._aborted or self._failure else LINGER_SECONDS)
            while self._connection.is_active() and not gone.wait(TICK / 4) and time.monotonic() < deadline:
                pass
        finally:
            self._connection.release()

    def _say_close(self) -> None:
        """Close in a thread of its own, because it blocks if nothing gets through any more."""
        with contextlib.suppress(*FAILURES):
            self._channel.close()

    # -- what went wrong -------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._aborted or self._closed:
            raise Interrupted(f"{self.peer}: " + ("cancelled" if self._aborted else "closed by this side"))

    def _check(self) -> None:
        self._check_usable()
        if self._failure:
            raise ChannelError(self._failure)

    def _broken(self) -> ChannelError:
        self._check_usable()
        if self._connection.is_active():
            self._failure = f"{self.peer}: the peer closed the connection"
        else:
            error = self._connection.saved_exception
            why = f": {error}" if isinstance(error, paramiko.SSHException) and str(error) else ""
            self._failure = f"{self.peer}: the ssh connection was lost{why}"
        return ChannelError(self._failure)


def _packets(parts: Sequence[Buffer], size: int) -> Iterator[bytes]:
    """Split into packets of `size` bytes; smaller parts share one."""
    small = bytearray()
    for part in parts:
        view = memoryview(part).cast("B")
        while view:
            if not small and len(view) >= size:
                yield bytes(view[:size])
                view = view[size:]
                continue
            room = size - len(small)
            small += view[:room]
            view = view[room:]
            if len(small) == size:
                yield bytes(small)
                small.clear()
    if small:
        yield bytes(small)
