"""A one-way channel over a file descriptor: a pipe, a FIFO, a device, a file.

Invariant: the descriptor is nonblocking and waits use poll together with the channel's Interrupt, so abort() ends every
wait. Subclasses add what else happens at the end (exit status, rename) in _finish, _ended and _leave.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import threading
from collections.abc import Callable
from typing import Final

from corefw.channel import Buffer, Channel, Interrupt, Listener
from corefw.errors import ChannelError, Interrupted
from corefw.net import IOV_MAX
from corefw.net.sockets import CLOSE_TICK, reason
from corefw.uri import MigrationUri

PIPE_SIZE: Final = 1 << 20
"""Requested pipe size in bytes, the maximum for ordinary users (fs.pipe-max-size). Measured: 1.6 times the throughput
of the usual 64 KiB, because the two ends wait for each other ten times less often."""


class PipeChannel(Channel):
    """Sends through `fd` if `outgoing`, otherwise receives from it. Owns the descriptor."""

    has_return_path = False

    def __init__(self, fd: int, peer: str, *, outgoing: bool) -> None:
        self.peer = peer
        self._fd = fd
        self._outgoing = outgoing
        self._wake = Interrupt()
        self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, self._flags | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # not a pipe, or the user's limit is reached
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._at_end = False
        self._aborted = False
        self._closed = False

    def send(self, *parts: Buffer) -> None:
        self._check(outgoing=True)
        assert not self._at_end, "send after send_eof"
        views = [memoryview(part).cast("B") for part in parts]
        at = 0
        while at < len(views):
            batch = views[at : at + IOV_MAX]
            try:
                sent = os.writev(self._fd, batch) if any(batch) else 0
            except BlockingIOError:
                self._wait(select.POLLOUT)
                continue
            except OSError as error:
                raise self._failed(error) from None
            while at < len(views) and sent >= len(views[at]):
                sent -= len(views[at])
                at += 1
            if sent:
                views[at] = views[at][sent:]
            self._check_aborted()

    def receive_into(self, view: memoryview) -> int:
        assert len(view), "receive_into an empty view"
        self._check(outgoing=False)
        while not self._at_end:
            try:
                count = os.readv(self._fd, [view])
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise self._failed(error) from None
            if count:
                return count
            self._ended()
            self._at_end = True
        return 0

    def wait_readable(self, seconds: float) -> bool:
        self._check(outgoing=False)
        return self._at_end or self._wait(select.POLLIN, seconds)

    def send_eof(self) -> None:
        self._check(outgoing=True)
        if not self._at_end:
            self._at_end = True
            self._finish()

    def abort(self) -> None:
        with self._lock:
            if not self._aborted and not self._closed:
                self._aborted = True
                self._wake.set()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.set()  # wakes waiting threads
        self._leave()
        self._let_go()
        self._wake.close()

    # -- for subclasses --------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Make the output final after everything was sent. Raises ChannelError, Interrupted."""
        self._let_go()

    def _ended(self) -> None:
        """Handle the end of the input: raise ChannelError if it is not a clean end."""

    def _leave(self) -> None:
        """Clean up in close(), whether or not _finish was called. Never raises."""

    def _let_go(self) -> None:
        """Close the descriptor, once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETFL, self._flags)  # the open file may be shared with others
            os.close(fd)

    def _failed(self, error: OSError) -> ChannelError:
        """Remember the error, which every later call raises too."""
        self._check_aborted()
        self._failure = self._failure or f"{self.peer}: {reason(error)}"
        return ChannelError(self._failure)

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_aborted(self) -> None:
        if self._aborted or self._closed:
            raise Interrupted(f"{self.peer}: " + ("cancelled" if self._aborted else "closed by this side"))

    def _check(self, *, outgoing: bool) -> None:
        self._check_aborted()
        if self._failure:
            raise ChannelError(self._failure)
        if outgoing != self._outgoing:
            raise ChannelError(f"{self.peer}: this transport is one-way, from the source to the destination")

    def _wait(self, events: int, seconds: float | None = None) -> bool:
        try:
            return self._wake.wait_for(self._fd, events, seconds)
        except (Interrupted, ValueError):  # ValueError: it was closed just now
            self._check_aborted()
            raise


class OneShotListener(Listener):
    """A listener for a source that already exists: accept() returns a single channel.

    opens       makes the channel
    closes      releases what `opens` would have used; called if no channel was made
    waits_for   a descriptor that has to become readable first, or None
    """

    def __init__(
        self,
        uri: MigrationUri,
        opens: Callable[[], Channel],
        closes: Callable[[], None] = lambda: None,
        waits_for: int | None = None,
    ) -> None:
        self.uri = uri
        self._opens = opens
        self._closes = closes
        self._waits_for = waits_for
        self._accepting = threading.Lock()
        self._used = False
        self._closed = False

    def accept(self, interrupt: Interrupt) -> Channel:
        interrupt.check()
        with self._accepting:
            if self._used and not self._closed:
                raise ChannelError(f"{self.uri}: its only stream is already in use")
            self._wait(interrupt)
            channel = self._opens()
            self._used = True
            return channel

    def _wait(self, interrupt: Interrupt) -> None:
        ready = self._waits_for is None
        while not self._closed and not ready:
            assert self._waits_for is not None
            ready = interrupt.wait_for(self._waits_for, select.POLLIN, CLOSE_TICK)
        if self._closed:
            raise ChannelError(f"{self.uri}: is no longer listening")

    def close(self) -> None:
        self._closed = True
        with self._accepting:  # accept() may be polling the descriptor
            if not self._used:
                self._used = True
                self._closes()
