"""Channels and listeners over stream sockets, for every transport that uses them.

Invariant: a broken connection never looks like an end, even if the kernel reported the break to another thread first.
An aborted TCP channel is reset, so that its peer sees a break. A UNIX socket has no such signal: there the stream
itself has to show where it ends.

`corefw.net.dialing` makes the sockets.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from corefw.channel import (
    Buffer,
    Channel,
    Interrupt,
    LimitsSilence,
    Listener,
    ReceivesFromSocket,
    ReceivesMemory,
    SendsMemory,
    SendsToSocket,
)
from corefw.errors import ChannelError, Interrupted
from corefw.net import IOV_MAX
from corefw.net.lingering import close_now, end_politely
from corefw.uri import MigrationUri, join_host_port

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SEND_TICK: Final = 0.1
"""Seconds after which a blocked send checks whether it was aborted. A blocked *receive* ends when the reading side is
shut down, which the peer does not notice; shutting down the writing side would send the peer a clean end."""

RECEIVE_TICK: Final = 0.001
"""Seconds that a receive into memory waits for more bytes. The kernel rounds it up to its clock's next tick."""

CLOSE_TICK: Final = 0.1
"""Seconds after which a wait that close() cannot wake notices it. (A receive, for one: shutting down the reading side
would wake it, but close() still reads what the peer sends.)"""

KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6}
"""A peer that does not answer is found dead after 90 seconds instead of two hours."""

UNPACED: Final = b"reno"
"""The congestion control of connections within this host; every kernel has it and lets every user choose it. The host's
default may pace what is sent, as BBR does, so that the sender waits for timers while the receiver is idle
(docs/decisions/unpaced.md)."""

VAGUE: Final = frozenset({errno.EPIPE, errno.ENOTCONN})
"""What a call gets if the kernel has given the reason of a break to another one: it does that once."""

EXPLANATION: Final = 5.0
EXPLANATION_TICK: Final = 0.002
"""Seconds that a call which got one of VAGUE waits for the reason from others that are under way, which end at once;
and between two looks at them."""

_TCP_CLOSE: Final = 7  # the kernel's TCP_CLOSE, first byte of struct tcp_info

REASONS: Final = {
    errno.ECONNREFUSED: "connection refused (is the destination listening?)",
    errno.ECONNRESET: "the peer reset the connection",
    errno.ENOTCONN: "the peer reset the connection",  # shutdown() after the reset was reported
    errno.EPIPE: "the peer closed the connection",
    errno.ETIMEDOUT: "no answer from the peer",
    errno.EADDRINUSE: "the address is in use (is another process listening there?)",
    errno.EADDRNOTAVAIL: "this host does not have that address",
    errno.EACCES: "permission denied",
}


def reason(error: OSError) -> str:
    """The error as a phrase: one of REASONS, or strerror."""
    if error.errno in REASONS:
        return REASONS[error.errno]
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def is_tcp(sock: socket.socket) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6)


def check_peer_user(sock: socket.socket) -> str | None:
    """The reason why the process at the other end of a UNIX socket may not use it (its user is neither this one nor
    root); None if it may."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid in (0, os.geteuid()):
        return None
    return f"it is from user {uid}, expected user {os.geteuid()} or root (--allow-any-user admits every user)"


class SocketChannel(Channel, LimitsSilence, SendsMemory, SendsToSocket, ReceivesMemory, ReceivesFromSocket):
    """A channel over a connected stream socket, which it owns.

    abort() ends a receive at once and a send within SEND_TICK; the peer notices when the channel is closed.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.has_return_path = True
        self._socket = sock
        self._tcp = is_tcp(sock)
        self._lock = threading.Lock()
        self._aborted = False
        self._closed = False
        self._failure: str | None = None
        self._explained = threading.Event()  # it is what the kernel said
        self._calling: set[int] = set()  # threads that the kernel may be telling why the connection broke
        self._ended = False
        self._eof_sent = False
        _prepare(sock, self._tcp)

    def send(self, *parts: Buffer) -> None:
        views = [memoryview(part).cast("B") for part in parts]
        at = 0
        self._check()
        while at < len(views):
            part = views[at : at + IOV_MAX]
            sent = self._transfer(partial(self._socket.sendmsg, part, (), socket.MSG_NOSIGNAL)) or 0
            while at < len(views) and sent >= len(views[at]):
                sent -= len(views[at])
                at += 1
            if at < len(views):  # if all was taken, it was sent, even if the connection has broken by now
                views[at] = views[at][sent:]
                self._check()

    def send_memory(self, pieces: NDArray[np.uint64]) -> None:
        """See SendsMemory."""
        from corefw.net import iovec  # noqa: PLC0415 - with NumPy, which a control socket has no use for

        self._check()
        while len(pieces):
            sent = self._transfer(partial(iovec.send_some, self._socket.fileno(), pieces)) or 0
            pieces = iovec.rest(pieces, sent)
            if len(pieces):
                self._check()

    def send_to_socket(self, send: Callable[[int], int]) -> int:
        """See SendsToSocket."""
        while True:
            self._check()
            if (sent := self._transfer(partial(send, self._socket.fileno()))) is not None:
                return sent

    def receive_into(self, view: memoryview) -> int:
        assert len(view), "receive_into an empty view"
        return self._receive(lambda: self._socket.recv_into(view))

    def try_receive_into(self, view: memoryview) -> int | None:
        assert len(view), "try_receive_into an empty view"
        return self._try_receive(lambda: self._socket.recv_into(view, 0, socket.MSG_DONTWAIT))

    def receive_memory(self, pieces: NDArray[np.uint64]) -> int:
        """See ReceivesMemory."""
        from corefw.net import iovec  # noqa: PLC0415 - as above

        assert len(pieces), "receive_memory into no pieces"
        return self.receive_from_socket(lambda descriptor: iovec.receive_some(descriptor, pieces))

    def receive_from_socket(self, receive: Callable[[int], int]) -> int:
        """See ReceivesFromSocket."""
        return self._receive(lambda: receive(self._socket.fileno()))

    def _receive(self, receive: Callable[[], int]) -> int:
        while (count := self._try_receive(receive)) is None:  # RECEIVE_TICK is over
            self._wait_for_input(None)
        return count

    def _try_receive(self, receive: Callable[[], int]) -> int | None:
        self._check_aborted()  # not _check(): bytes that came before a send failed can still be received
        if self._ended:
            return 0
        if (count := self._transfer(partial(self._with_memory, receive))) is None:
            return None
        self._check_aborted()
        if count == 0:
            self._check_end()
            self._ended = True
        return count

    def _with_memory(self, receive: Callable[[], int]) -> int:
        try:
            return receive()
        except OSError as error:
            if error.errno == errno.EFAULT:  # no memory here; the connection is intact, so the peer can be told
                raise ChannelError(f"{self.peer}: out of memory to receive into") from None
            raise

    def _transfer(self, call: Callable[[], int]) -> int | None:
        """What a system call on the socket returns; None if its tick is over. Raises ChannelError."""
        me = threading.get_ident()
        self._calling.add(me)
        try:
            return call()
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self._calling.discard(me)

    def wait_readable(self, seconds: float) -> bool:
        self._check_aborted()
        if self._ended:
            return True
        return self._wait_for_input(seconds)

    def _wait_for_input(self, seconds: float | None) -> bool:
        """Wait for bytes or the end; False after `seconds`. Raises Interrupted after abort() or close()."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = CLOSE_TICK if deadline is None else min(CLOSE_TICK, max(0.0, deadline - time.monotonic()))
            poll = select.poll()
            try:
                poll.register(self._socket, select.POLLIN)
            except ValueError:  # it was closed just now
                self._check_aborted()
                raise
            ready = bool(poll.poll(left * 1000))
            self._check_aborted()
            if ready or (deadline is not None and time.monotonic() >= deadline):
                return ready

    def limit_unsent(self, count: int) -> None:
        """See Channel. Does nothing for a UNIX socket, which has a small buffer."""
        if self._tcp:
            with contextlib.suppress(OSError):  # the next send shows what is wrong
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, count)

    def limit_silence(self, seconds: float) -> None:
        """See LimitsSilence. TCP's first keepalive is sent after half of the time."""
        if not self._tcp:
            return
        options = {
            socket.TCP_USER_TIMEOUT: int(seconds * 1000),
            socket.TCP_KEEPIDLE: max(1, int(seconds / 2)),
            socket.TCP_KEEPINTVL: max(1, int(seconds / 8)),
            socket.TCP_KEEPCNT: 4,
        }
        with contextlib.suppress(OSError):  # if the peer has gone, the first send or receive shows it
            for option, value in options.items():
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def send_eof(self) -> None:
        self._check()
        if self._eof_sent:
            return
        self._eof_sent = True
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise self._failed(error) from None

    def abort(self) -> None:
        with self._lock:
            if self._aborted or self._closed:
                return
            self._aborted = True
            try:
                # A send in progress waits a tick for each of its messages: end these waits.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 1))
                if self._tcp:
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._socket.shutdown(socket.SHUT_RD)
            except OSError:
                pass  # not connected any more, so no call is blocked

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._aborted or self._failure or not end_politely(self._socket, self._tcp):
            close_now(self._socket)

    # -- what went wrong -------------------------------------------------------------------------------------------

    def _check_aborted(self) -> None:
        if self._aborted or self._closed:
            raise Interrupted(f"{self.peer}: " + ("cancelled" if self._aborted else "closed by this side"))

    def _check(self) -> None:
        self._check_aborted()
        if self._failure:
            raise ChannelError(self._failure)

    def _failed(self, error: OSError) -> ChannelError:
        """The error to raise, now and later: the kernel reports a reset once, and then an end."""
        vague = error.errno in VAGUE
        if vague:
            self._await_explanation()
        self._check_aborted()
        if self._failure is None or not (vague or self._explained.is_set()):
            self._failure = f"{self.peer}: {reason(error)}"
        if not vague:
            self._explained.set()
        return ChannelError(self._failure)

    def _await_explanation(self) -> None:
        """Another thread may know what the kernel says."""
        self._calling.discard(threading.get_ident())
        deadline = time.monotonic() + EXPLANATION
        while self._calling and time.monotonic() < deadline and not self._explained.wait(EXPLANATION_TICK):
            pass

    def _check_end(self) -> None:
        """Raise ChannelError if this end is a reset that the kernel has just reported to the sending thread.

        While our own direction is open, a clean end leaves the connection half open; only a reset closes it.
        """
        if self._failure:
            raise ChannelError(self._failure)
        if self._tcp and not self._eof_sent:
            state = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            if state == _TCP_CLOSE:
                raise self._failed(OSError(errno.ENOTCONN, ""))


def _prepare(sock: socket.socket, tcp: bool) -> None:
    # These timeouts stay with the socket after the channel is closed, also for other processes that share it (fd:).
    # The kernel adapts the sizes of the buffers to the path until one sets them. 1 and 4 MiB gained nothing measurable
    # over loopback.
    sock.setblocking(True)
    try:
        for option, seconds in ((socket.SO_SNDTIMEO, SEND_TICK), (socket.SO_RCVTIMEO, RECEIVE_TICK)):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 0, int(seconds * 1_000_000)))
        if tcp:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            if sock.getpeername()[0] == sock.getsockname()[0]:  # within this host
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
    except OSError:
        pass  # if the peer has gone, the first send or receive shows it


class SocketListener(Listener):
    """The listening sockets of one URI: one for each address of a name. Owns them.

    sockets   for servers that accept connections themselves (QMP, ZeroMQ); they are non-blocking
    remove    called once by close(), before the sockets are closed: removes a socket file
    check     called with each new connection: returns why it is rejected, or None
    """

    def __init__(
        self,
        uri: MigrationUri,
        sockets: Sequence[socket.socket],
        remove: Callable[[], None] | None = None,
        check: Callable[[socket.socket], str | None] | None = None,
    ) -> None:
        self.uri = uri
        self.sockets = tuple(sockets)
        self._remove = remove
        self._check = check
        self._closing = Interrupt()
        self._accepting = threading.Lock()
        self._lock = threading.Lock()
        self._closed = False
        for sock in self.sockets:
            sock.setblocking(False)

    def accept(self, interrupt: Interrupt) -> SocketChannel:
        # close() takes this lock too. If a descriptor were closed just before it is polled, the poll would watch the
        # next file that gets its number.
        with self._accepting:
            if self._closed:
                raise self._closed_error()
            by_fd = {sock.fileno(): sock for sock in self.sockets}
            poll = select.poll()
            for fd in (interrupt.fileno(), self._closing.fileno(), *by_fd):
                poll.register(fd, select.POLLIN)
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if interrupt.fileno() in ready:
                    raise Interrupted(f"{self.uri}: cancelled")
                if self._closed:
                    raise self._closed_error()
                try:
                    connection, address = by_fd[ready.pop()].accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue  # the peer has gone again
                except OSError as error:
                    raise ChannelError(f"{self.uri}: {reason(error)}") from None
                if self._check and (why := self._check(connection)):
                    log.warning("%s: rejected a connection: %s", self.uri, why)
                    connection.close()
                    continue
                return SocketChannel(connection, self._peer(address))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._closing.set()
        if self._remove:
            self._remove()
        with self._accepting:
            for sock in self.sockets:
                sock.close()
            self._closing.close()

    def _closed_error(self) -> ChannelError:
        return ChannelError(f"{self.uri}: is no longer listening")

    def _peer(self, address: object) -> str:
        if isinstance(address, tuple):
            return f"{self.uri.scheme}:{join_host_port(address[0].removeprefix('::ffff:'), address[1])}"
        return str(self.uri)
