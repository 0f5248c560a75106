"""The hub of one outgoing stream.

Invariant: it never reconnects (ZeroMQ would connect to the next listener in the middle of the stream). The connection
is open once the listener has answered our greeting; until then, failures come from ZeroMQ's monitor.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from corefw.channel import Interrupt
from corefw_transport_zmq.hub import LOST, Hub, Socket, pack, read
from corefw_transport_zmq.link import Link
from corefw_transport_zmq.protocol import Kind, Message, ProtocolError, greeting, read_greeting, text

_MONITOR: Final = "inproc://monitor"
_GIVE_UP_SECONDS: Final = 3.0

_NOBODY: Final = "nothing listens there (is the destination listening?)"
_HANDSHAKE: Final = (
    "the handshake failed: one side uses keys and the other does not, the server-key is not the listener's, "
    "or it is no ZeroMQ socket of the right kind"
)
_NOT_AUTHORIZED: Final = "the listener rejected our key (is its public half in the folder of authorized=?)"

EVENTS: Final[dict[int, str]] = {
    zmq.Event.CLOSED: _NOBODY,
    zmq.Event.CONNECT_RETRIED: _NOBODY,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: _HANDSHAKE,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: _HANDSHAKE,
    zmq.Event.HANDSHAKE_FAILED_AUTH: _NOT_AUTHORIZED,
    zmq.Event.DISCONNECTED: LOST,
}
"""Event that ends a connection -> reason. The first one counts."""


class DiallingHub(Hub):
    """failure   why the listener does not answer; None if it does"""

    def __init__(self, socket: Socket, peer: str) -> None:
        super().__init__(socket, "migfw-zmq-dial")
        self.failure: str | None = None
        self._answered = Interrupt()
        self.link = Link(peer, self.wake, pack)
        self._welcomed = False
        self._gave_up = False
        socket.reconnect_ivl = -1
        socket.monitor(_MONITOR, sum(EVENTS))
        self._monitor: Socket = socket.context.socket(zmq.PAIR)
        self._monitor.linger = 0
        self._monitor.connect(_MONITOR)
        self._poller.register(self._monitor, zmq.POLLIN)

    def dial(self, endpoint: str, interrupt: Interrupt, seconds: float) -> None:
        """Connect, start the thread and wait until the listener answers; `failure` has the result. Call it once; on
        failure the hub has ended. Raises Interrupted, zmq.ZMQError."""
        try:
            try:
                self.socket.connect(endpoint)
            except BaseException:
                self.discard()
                raise
            self.send((), greeting(Kind.HELLO))
            self.start()
            try:
                if not interrupt.wait_for(self._answered.fileno(), select.POLLIN, seconds):
                    self.failure = f"no answer within {seconds:.0f} s"
            except BaseException:
                self._give_up()
                raise
            if self.failure:
                self._give_up()
        finally:
            with self._lock:
                self._answered.close()

    def _give_up(self) -> None:
        """End the hub: there is no peer to notify."""
        self._gave_up = True
        self.link.abort()
        self.link.close()
        self.wait(_GIVE_UP_SECONDS)

    def links(self) -> Sequence[tuple[list[bytes], Link]]:
        return [([], self.link)]

    def arrived(self, parts: list[zmq.Frame]) -> None:
        message = read(parts)
        if self._welcomed:
            if message:
                self.link.handle(message)
        elif message is None:
            self._fail("the listener does not speak migfw's protocol")
        elif message.kind is Kind.REFUSE:
            self._fail(f"the listener refuses: {text(message)}")
        else:
            self._welcome(message)

    def _welcome(self, message: Message) -> None:
        try:
            self.link.open(read_greeting(message, Kind.WELCOME), answer=False)
        except ProtocolError as error:
            return self._fail(f"the listener speaks a different version of migfw's protocol: {error}")
        self._welcomed = True
        return self._tell()

    def look_around(self, ready: dict[object, int]) -> bool:
        # First deliver what the peer sent before it left; it was received in this turn or will be in the next.
        if self._monitor in ready and self.socket not in ready:
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            self._fail(EVENTS.get(int(event["event"]), LOST))
        return not self.link.done

    def _fail(self, why: str) -> None:
        if not self._welcomed and self.failure is None:
            self.failure = _HANDSHAKE if why is LOST else why
            self._tell()
        self.socket.linger = 0
        self.link.lost(why)

    def _tell(self) -> None:
        with self._lock:
            if self._answered.fileno() >= 0:
                self._answered.set()

    def ended(self) -> None:
        if self._gave_up:
            self.socket.linger = 0
        if not self._welcomed:
            self.failure = self.failure or LOST
            self._tell()
        self.socket.disable_monitor()
        self._monitor.close()
