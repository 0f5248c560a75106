"""One tunnel as a Channel.

The law: an end is an end only when the remote sshd said so; a tunnel or a connection that went away in any other manner
raises. Sending blocks on the far side's window, so that memory stays bounded: at most WINDOW bytes wait here to be
received, twice that while they are taken over.

Threads: as Channel has it. close() goes on in a thread of its own while the far side has not got everything.
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
"""Seconds after which a blocked call looks whether it was aborted (most are woken at once)."""

ABORT_SECONDS: Final = 1.0
"""How long an aborted send on a shared connection may take to notice, before the whole connection is given up."""

CLOSE_SECONDS: Final = 2.0
"""How long close() itself waits for the far side; a thread goes on after that."""

LINGER_SECONDS: Final = 60.0

FAILURES: Final = (OSError, EOFError, paramiko.SSHException)
"""What paramiko raises when a connection is lost."""


class SshChannel(Channel):
    """A paramiko channel. Owns it, and is one user of its connection."""

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
            for packet in _packets(parts, self._channel.out_max_packet_size - 64):  # the room that paramiko leaves
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
        if self._channel.closed:  # the sshd waits with that for our end, unless it could not hand on what we sent
            raise self._broken()
        try:
            self._channel.shutdown_write()
        except FAILURES:
            raise self._broken() from None
        if not self._connection.is_active():  # paramiko drops what is sent over a lost connection, and says nothing
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
        self._check_usable()  # no more: what came before a send failed is still there to be received
        while not self._held and not self._ended:
            left = max(0.0, deadline - time.monotonic())
            # The sending thread goes by the same timeout: never let it sleep longer than a tick.
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
        """Take over all that has come. Raises TimeoutError, ChannelError."""
        try:
            # All of it at once: paramiko moves what it keeps to the front of its buffer.
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
        # Not a daemon: the program may end right after close(), and what was sent has to arrive.
        thread = threading.Thread(target=self._finish, name="migfw-ssh-close")
        thread.start()
        thread.join(CLOSE_SECONDS)

    def _finish(self) -> None:
        """Close the tunnel, and wait until the remote sshd, having handed on what we sent, has closed it too."""
        try:
            threading.Thread(target=self._say_close, name="migfw-ssh-close", daemon=True).start()
            gone = self._connection.unlinked(self._channel)
            deadline = time.monotonic() + (0.0 if self._aborted or self._failure else LINGER_SECONDS)
            while self._connection.is_active() and not gone.wait(TICK / 4) and time.monotonic() < deadline:
                pass
        finally:
            self._connection.release()

    def _say_close(self) -> None:
        """In a thread of its own: it blocks when nothing gets through any more."""
        with contextlib.suppress(*FAILURES):
            self._channel.close()

    # -- what went wrong -------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._aborted:
            raise Interrupted(f"{self.peer}: cancelled")
        assert not self._closed, "use of a closed channel"

    def _check(self) -> None:
        self._check_usable()
        if self._failure:
            raise ChannelError(self._failure)

    def _broken(self) -> ChannelError:
        if self._aborted:
            return Interrupted(f"{self.peer}: cancelled")
        if self._connection.is_active():
            self._failure = f"{self.peer}: the peer closed the connection"
        else:
            error = self._connection.saved_exception
            why = f": {error}" if isinstance(error, paramiko.SSHException) and str(error) else ""
            self._failure = f"{self.peer}: the ssh connection was lost{why}"
        return ChannelError(self._failure)


def _packets(parts: Sequence[Buffer], size: int) -> Iterator[bytes]:
    """Cut into pieces of `size`; parts that are smaller share one."""
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
