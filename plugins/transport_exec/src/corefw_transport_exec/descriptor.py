"""fd:N and fd:NAME: a stream through an open descriptor.

Invariant: the abilities of a descriptor are determined before anything is sent: a connected socket has a return path,
anything else is one-way. The channel owns the descriptor and closes it. A number must be a descriptor that the process
inherited: those that it opened itself are close-on-exec in Python, and taking one would break the guest.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable
from typing import Final

from corefw.channel import Channel, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.errors import ChannelError, UriError
from corefw.net import descriptors
from corefw.net.sockets import SocketChannel, reason
from corefw.uri import MigrationUri
from corefw_transport_exec.pipe import OneShotListener, PipeChannel

_STREAMS: Final[tuple[Callable[[int], bool], ...]] = (stat.S_ISFIFO, stat.S_ISREG, stat.S_ISCHR, stat.S_ISBLK)

_STANDARD: Final = (0, 1, 2)
"""Replaced by /dev/null instead of being closed, so that the next opened file does not take their numbers."""


class FdTransport(Transport):
    """fd:N, fd:NAME"""

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        super().__init__(uri, context)
        self._name = uri.rest
        self._is_number = self._name.isascii() and self._name.isdecimal()
        self._used = False
        fd = int(self._name) if self._is_number else descriptors.peek(self._name)
        if fd is None:
            raise UriError(f"'{uri}': no descriptor is called '{self._name}' (pass one with getfd, or give a number)")
        self.features = self._look_at(fd)

    def connect(self, interrupt: Interrupt) -> Channel:
        interrupt.check()
        if not self.features.outgoing:
            raise ChannelError(f"{self.uri}: the descriptor is open for reading only")
        return self._channel(outgoing=True)

    def listen(self) -> Listener:
        if not self.features.incoming:
            raise ChannelError(f"{self.uri}: the descriptor is open for writing only")
        return OneShotListener(self.uri, lambda: self._channel(outgoing=False))

    def _look_at(self, fd: int) -> TransportFeatures:
        try:
            mode = os.fstat(fd).st_mode
            access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            own = self._is_number and fd not in _STANDARD and not os.get_inheritable(fd)
        except (OSError, OverflowError):
            raise UriError(f"'{self.uri}': descriptor {self._name} is not open in process {os.getpid()}") from None
        if own:
            raise UriError(
                f"'{self.uri}': descriptor {self._name} is this process's own,"
                " expected one that it was started with (or the NAME of one passed with getfd)"
            )
        if stat.S_ISSOCK(mode):
            self._check_socket(fd)
            return TransportFeatures(return_path=True, multi_channel=False)
        if not any(is_one(mode) for is_one in _STREAMS):
            raise UriError(f"'{self.uri}': descriptor {self._name} is not a socket, pipe or file")
        return TransportFeatures(
            return_path=False, multi_channel=False, incoming=access != os.O_WRONLY, outgoing=access != os.O_RDONLY
        )

    def _check_socket(self, fd: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.type != socket.SOCK_STREAM:
                raise UriError(f"'{self.uri}': it is a datagram or packet socket, expected a stream socket")
            try:
                sock.getpeername()
            except OSError as error:
                raise UriError(f"'{self.uri}': expected a connected socket ({reason(error)})") from None

    def _channel(self, *, outgoing: bool) -> Channel:
        fd = None if self._used else self._take()
        if fd is None:
            raise ChannelError(f"{self.uri}: the descriptor has already been used")
        self._used = True
        os.set_inheritable(fd, False)
        if self.features.return_path:
            return SocketChannel(socket.socket(fileno=fd), str(self.uri))
        return PipeChannel(fd, str(self.uri), outgoing=outgoing)

    def _take(self) -> int | None:
        if not self._is_number:
            return descriptors.take(self._name)
        fd = int(self._name)
        if fd not in _STANDARD:
            return fd
        taken = os.dup(fd)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, fd)
        os.close(null)
        return taken
