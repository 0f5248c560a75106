"""The transports tcp: and unix:, as in QEMU: a plain stream over one socket.

tcp:HOST:PORT   a name, an IPv4 address, or an IPv6 address in brackets. A listener may have port 0, for a free one, and
                an empty host, for every address
unix:PATH       a socket file with mode 0600. unix:@NAME is a name in Linux's abstract space, which needs no file and
                accepts only the same user and root, unless the engine runs with --allow-any-user
"""

from __future__ import annotations

from typing import Final

from corefw.channel import Channel, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.net.dialing import check_unix_path, connect_tcp, connect_unix, listen_tcp, listen_unix
from corefw.uri import MigrationUri, check_dialled_port, split_host_port

_BOTH_WAYS: Final = TransportFeatures(return_path=True, multi_channel=True)


class TcpTransport(Transport):
    """tcp:HOST:PORT"""

    features = _BOTH_WAYS

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        super().__init__(uri, context)
        self._host, self._port = split_host_port(uri.rest, str(uri))

    def check_outgoing(self) -> None:
        super().check_outgoing()
        check_dialled_port(self._port, str(self.uri))

    def connect(self, interrupt: Interrupt) -> Channel:
        return connect_tcp(self._host, self._port, self.uri, interrupt)

    def listen(self) -> Listener:
        return listen_tcp(self._host, self._port, self.uri)


class UnixTransport(Transport):
    """unix:PATH, unix:@NAME"""

    features = _BOTH_WAYS

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        super().__init__(uri, context)
        check_unix_path(uri.rest, uri)

    def connect(self, interrupt: Interrupt) -> Channel:
        return connect_unix(self.uri.rest, self.uri, interrupt)

    def listen(self) -> Listener:
        return listen_unix(self.uri.rest, self.uri, any_user=self.context.any_user)
