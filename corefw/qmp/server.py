"""The QMP server of one engine.

Invariant: nothing that a client does keeps the engine or other clients waiting. The server answers as QEMU does
(protocol.py, commands/), so QEMU's tools can drive it.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

from corefw.channel import Interrupt
from corefw.closing import Closing
from corefw.net.dialing import listen_tcp, listen_unix
from corefw.qmp import answers, documents, protocol
from corefw.qmp.address import QmpAddress, parse_address
from corefw.qmp.admission import whom_to_disconnect
from corefw.qmp.commands import command_table
from corefw.qmp.connection import Connection
from corefw.qmp.session import Session
from corefw.uri import MigrationUri, UnixAddress

if TYPE_CHECKING:
    from corefw.dispatch import Event
    from corefw.engine import Engine
    from corefw.net.sockets import SocketListener

log = logging.getLogger(__name__)

MAX_CLIENTS: Final = 32
"""Beyond this number a client is served only if an idle one can be disconnected (admission.py)."""

FLUSH_SECONDS: Final = 2.0
"""How long close() waits for clients to read what was sent to them."""

_LEAVE_SECONDS: Final = 1.0
_ACCEPT_PAUSE: Final = 0.2
"""Seconds to wait if there is no descriptor or memory for one more client."""


class QmpServer(Closing):
    """Listens once it is constructed. One thread accepts, two serve each client; all of them are daemons.

    address   what clients dial, with the port that was taken for 0
    """

    def __init__(self, engine: Engine, address: QmpAddress | str) -> None:
        """Raises UriError, or ChannelError if it cannot listen there (another process does)."""
        self._engine = engine
        self._commands = command_table(engine)
        self._listener = _listen(parse_address(address) if isinstance(address, str) else address)
        self.address: Final = parse_address(str(self._listener.uri))
        self._lock = threading.Lock()
        self._clients: set[Connection] = set()
        self._closed = False
        self._quit = threading.Event()
        self._interrupt = Interrupt()
        self._greeting = protocol.encode(protocol.greeting())
        self._unobserve = engine.observe(self._broadcast)
        self._accepting = threading.Thread(target=self._accept, name="qmp-accept", daemon=True)
        self._accepting.start()

    @property
    def clients(self) -> int:
        """How many are connected now."""
        with self._lock:
            return len(self._clients)

    def wait_quit(self, seconds: float | None = None) -> bool:
        """Block until a client has sent `quit`, on which the caller ends the process; False after `seconds`."""
        return self._quit.wait(seconds)

    def close(self) -> None:
        """Stop listening, let clients read what was sent to them, then disconnect them. Idempotent; does not raise."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._unobserve()
        self._interrupt.set()
        self._accepting.join()
        self._listener.close()
        self._interrupt.close()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.close(FLUSH_SECONDS)
        deadline = time.monotonic() + FLUSH_SECONDS + 1
        for client in clients:
            client.join(max(0.0, deadline - time.monotonic()))

    # -- clients ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        by_fd = {sock.fileno(): sock for sock in self._listener.sockets}
        poll = select.poll()
        for fd in (self._interrupt.fileno(), *by_fd):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._interrupt.fileno() in ready:
                return
            try:
                sock, where = by_fd[ready.pop()].accept()
            except (BlockingIOError, ConnectionError):
                continue  # that client is gone again
            except OSError as error:
                log.warning("QMP: cannot accept a client: %s", error)
                if self._interrupt.wait(_ACCEPT_PAUSE):
                    return
                continue
            self._welcome(sock, str(where) if where else str(self.address))

    def _welcome(self, sock: socket.socket, peer: str) -> None:
        if not self._make_room():
            log.warning("QMP: %d clients are connected and none is idle, so client %s is refused", MAX_CLIENTS, peer)
            sock.close()
            return
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = Connection(sock, peer, Session(self._engine, self._commands, self._ask_quit), self._gone)
        except OSError as error:
            log.warning("QMP: cannot serve a client: %s", error)
            sock.close()
            return
        with self._lock:
            self._clients.add(client)
        try:
            client.start(self._greeting)
        except RuntimeError as error:
            log.warning("QMP: cannot serve a client: %s", error)

    def _make_room(self) -> bool:
        with self._lock:
            clients = list(self._clients)
        if len(clients) < MAX_CLIENTS:
            return True
        leaving = whom_to_disconnect(clients)
        if leaving is None:
            return False
        log.warning("QMP: %d clients are connected: idle client %s is disconnected", MAX_CLIENTS, leaving.peer)
        leaving.close(0)
        leaving.join(_LEAVE_SECONDS)
        return True

    def _gone(self, client: Connection) -> None:
        with self._lock:
            self._clients.discard(client)

    # -- events ----------------------------------------------------------------------------------------------------

    def _broadcast(self, event: Event) -> None:
        found = answers.event_document(event)
        if found is None:
            return
        name, data = found
        if name in documents.OPTIONAL_EVENTS and not self._engine.settings.capability("events"):
            return
        self._post(protocol.encode(protocol.event(name, data, event.timestamp)))

    def _post(self, line: bytes) -> None:
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.post(line)

    def _ask_quit(self) -> None:
        """Send the event before the reply, as QEMU does."""
        self._post(
            protocol.encode(protocol.event("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, time.time()))
        )
        self._quit.set()


def _listen(address: QmpAddress) -> SocketListener:
    uri = MigrationUri.parse(str(address))
    if isinstance(address, UnixAddress):
        return listen_unix(address.path, uri)
    return listen_tcp(address.host, address.port, uri)
