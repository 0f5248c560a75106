"""ZmqTransport and its listener.

Threads: connect() and accept() block the caller's thread; the sockets belong to the hubs' threads.
"""

from __future__ import annotations

import os
import select
import threading
from typing import Final

import zmq

from corefw.channel import Channel, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.errors import ChannelError
from corefw.net.dialing import listen_tcp, listen_unix, resolve
from corefw.net.sockets import SocketListener
from corefw.uri import MigrationUri, TcpAddress, UnixAddress, check_dialled_port
from corefw_transport_zmq.address import Place, endpoint, parse_address
from corefw_transport_zmq.channel import ZmqChannel
from corefw_transport_zmq.dialling import DiallingHub
from corefw_transport_zmq.hub import make_socket
from corefw_transport_zmq.keys import load_keys, secure_dialler, secure_listener
from corefw_transport_zmq.serving import ServingHub

ANSWER_SECONDS: Final = 10.0
"""Seconds that a listener may take to answer."""


class ZmqTransport(Transport):
    """zmq:tcp://HOST:PORT, zmq:ipc://PATH"""

    def __init__(self, uri: MigrationUri, context: TransportContext) -> None:
        super().__init__(uri, context)
        self._address = parse_address(uri)
        self._keys = load_keys(self._address.options, uri)
        self.features = TransportFeatures(
            return_path=True,
            multi_channel=True,
            incoming=self._keys is None or self._keys.authorized is not None,
            outgoing=self._keys is None or self._keys.server is not None,
        )

    # -- dialling --------------------------------------------------------------------------------------------------

    def check_outgoing(self) -> None:
        super().check_outgoing()
        if isinstance(self._address.place, TcpAddress):
            check_dialled_port(self._address.place.port, str(self.uri))

    def connect(self, interrupt: Interrupt) -> Channel:
        interrupt.check()
        place = self._address.place
        if isinstance(place, TcpAddress) and place.port == 0:
            raise ChannelError(f"{self.uri}: port 0 cannot be dialled (use the port that the listener reports)")
        failures: dict[str, None] = {}
        for dialled in self._endpoints(place, interrupt):
            hub = self._dial(dialled, interrupt)
            if hub.failure is None:
                return ZmqChannel(hub.link, hub)
            failures[hub.failure] = None
        raise ChannelError(f"{self.uri}: {'; '.join(failures)}")

    def _endpoints(self, place: Place, interrupt: Interrupt) -> list[str]:
        if isinstance(place, UnixAddress):
            return [endpoint(place)]
        addresses = resolve(place.host, place.port, self.uri, interrupt)
        return [endpoint(TcpAddress(str(one.sockaddr[0]), place.port)) for one in addresses]

    def _dial(self, dialled: str, interrupt: Interrupt) -> DiallingHub:
        socket = make_socket(zmq.DEALER)
        try:
            secure_dialler(socket, self._keys, self.uri)
        except BaseException:
            socket.context.destroy(0)
            raise
        hub = DiallingHub(socket, str(self.uri))
        try:
            hub.dial(dialled, interrupt, ANSWER_SECONDS)
        except zmq.ZMQError as error:
            raise ChannelError(f"{self.uri}: {error.strerror}") from None
        return hub

    # -- waiting ---------------------------------------------------------------------------------------------------

    def listen(self) -> Listener:
        place = self._address.place
        socket = make_socket(zmq.ROUTER)
        try:
            gatekeeper = secure_listener(socket, self._keys, self.uri) if self._keys else None
            if isinstance(place, UnixAddress):
                listener = listen_unix(place.path, self.uri, any_user=self.context.any_user)
                if place.path.startswith("@") and not self.context.any_user:
                    for uid in {0, os.geteuid()}:  # ZeroMQ accepts by itself, so it has to check by itself as well
                        socket.setsockopt(zmq.IPC_FILTER_UID, uid)
            else:
                listener = listen_tcp(place.host, place.port, self.uri)
                place = TcpAddress(place.host, listener.sockets[0].getsockname()[1])
            _bind(socket, listener, place)
        except zmq.ZMQError as error:
            socket.context.destroy(0)
            raise ChannelError(f"{self.uri}: {error.strerror}") from None
        except BaseException:
            socket.context.destroy(0)
            raise
        uri = self._address.at(place)
        hub = ServingHub(socket, str(uri), gatekeeper)
        hub.start()
        return ZmqListener(uri, hub, listener)


def _bind(socket: zmq.Socket[bytes], listener: SocketListener, place: Place) -> None:
    """Let ZeroMQ accept from our own sockets: its own bind takes a socket file away from a running listener."""
    for sock in listener.sockets:
        bound = TcpAddress(*sock.getsockname()[:2]) if isinstance(place, TcpAddress) else place
        fd = os.dup(sock.fileno())
        socket.setsockopt(zmq.USE_FD, fd)
        try:
            socket.bind(endpoint(bound))
        except zmq.ZMQError:
            os.close(fd)
            listener.close()
            raise


class ZmqListener(Listener):
    """A hub and the listening sockets that it accepts from."""

    def __init__(self, uri: MigrationUri, hub: ServingHub, sockets: SocketListener) -> None:
        self.uri = uri
        self._hub = hub
        self._sockets = sockets
        self._closed = False
        self._accepting = threading.Lock()

    def accept(self, interrupt: Interrupt) -> Channel:
        interrupt.check()
        with self._accepting:
            while not self._closed:
                if link := self._hub.take():
                    return ZmqChannel(link)
                if self._hub.wait(0):
                    raise ChannelError(f"{self.uri}: ZeroMQ failed, it is no longer listening")
                interrupt.wait_for(self._hub.arrived_fd, select.POLLIN)
        raise ChannelError(f"{self.uri}: is no longer listening")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._sockets.close()
        self._hub.close()
        with self._accepting:  # not while accept() polls it: its number may be another file's at once
            os.close(self._hub.arrived_fd)
