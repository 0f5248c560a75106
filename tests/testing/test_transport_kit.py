"""The contract kit for transports catches every kind of broken transport, and names what is wrong."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from corefw_transport_tcp import TcpTransport
from numpy.typing import NDArray

from corefw.channel import (
    Buffer,
    Channel,
    Interrupt,
    Listener,
    ReceivesFromSocket,
    ReceivesMemory,
    SendsMemory,
    SendsToSocket,
    TransportFeatures,
)
from corefw.errors import ChannelError
from corefw.net import iovec
from corefw.net.sockets import SocketChannel
from corefw.testing import tasks
from corefw.testing.ends import TransportFactory
from corefw.testing.transport import CHECKS, TransportCase, applicable, check_transport


class Proxy(Channel):
    """Forwards to another channel. Each fault below overrides one method."""

    def __init__(self, inner: Channel) -> None:
        self.inner = inner
        self.peer = inner.peer
        self.has_return_path = inner.has_return_path

    def send(self, *parts: Buffer) -> None:
        self.inner.send(*parts)

    def receive_into(self, view: memoryview) -> int:
        return self.inner.receive_into(view)

    def wait_readable(self, seconds: float) -> bool:
        return self.inner.wait_readable(seconds)

    def send_eof(self) -> None:
        self.inner.send_eof()

    def abort(self) -> None:
        self.inner.abort()

    def close(self) -> None:
        self.inner.close()


class Wrapped(Listener):
    def __init__(self, inner: Listener, wrap: Callable[[Channel], Channel]) -> None:
        self.inner = inner
        self.uri = inner.uri
        self.wrap = wrap

    def accept(self, interrupt: Interrupt) -> Channel:
        return self.wrap(self.inner.accept(interrupt))

    def close(self) -> None:
        self.inner.close()


def faulty(
    channel: Callable[[Channel], Channel] = Proxy,
    listener: Callable[[Listener, Callable[[Channel], Channel]], Listener] = Wrapped,
    features: TransportFeatures = TcpTransport.features,
) -> TransportFactory:
    """A tcp: transport with a fault."""

    class Faulty(TcpTransport):
        def connect(self, interrupt: Interrupt) -> Channel:
            return channel(super().connect(interrupt))

        def listen(self) -> Listener:
            return listener(super().listen(), channel)

    Faulty.features = features
    return Faulty


# -- faults --------------------------------------------------------------------------------------------------------


class LosesBytes(Proxy):
    """Drops the rest of a long send."""

    def send(self, *parts: Buffer) -> None:
        self.inner.send(*(memoryview(part)[: 1 << 19] for part in parts))


class Reorders(Proxy):
    def send(self, *parts: Buffer) -> None:
        self.inner.send(*reversed(parts))


class TakesFewParts(Proxy):
    def send(self, *parts: Buffer) -> None:
        if len(parts) > 1024:
            raise OSError(22, "Invalid argument")
        self.inner.send(*parts)


class SendsFewPieces(Proxy, SendsMemory):
    """Drops the pieces that one system call does not take."""

    def send_memory(self, pieces: NDArray[np.uint64]) -> None:
        assert isinstance(self.inner, SendsMemory)
        self.inner.send_memory(pieces[:1024])


class FillsFromTheEnd(Proxy, ReceivesMemory):
    def receive_memory(self, pieces: NDArray[np.uint64]) -> int:
        assert isinstance(self.inner, ReceivesMemory)
        return self.inner.receive_memory(np.ascontiguousarray(pieces[::-1]))


class WaitsForAllPieces(Proxy, ReceivesMemory):
    def receive_memory(self, pieces: NDArray[np.uint64]) -> int:
        assert isinstance(self.inner, ReceivesMemory)
        got = 0
        while len(pieces) and (count := self.inner.receive_memory(pieces)):
            pieces = iovec.rest(pieces, count)
            got += count
        return got


class LendsOnce(Proxy, ReceivesFromSocket):
    """Does not wait for the first byte."""

    def receive_from_socket(self, receive: Callable[[int], int]) -> int:
        assert isinstance(self.inner, SocketChannel)
        return receive(self.inner._socket.fileno())


class LendsAnother(Proxy, ReceivesFromSocket):
    """Lends a socket that has nothing to do with the stream."""

    def receive_from_socket(self, receive: Callable[[int], int]) -> int:
        out, into = socket.socketpair()
        with into:
            out.close()
            while True:
                with contextlib.suppress(BlockingIOError):
                    return receive(into.fileno())


class LendsForOneSend(Proxy, ReceivesFromSocket, SendsToSocket):
    """Does not wait until a byte can be sent."""

    def receive_from_socket(self, receive: Callable[[int], int]) -> int:
        assert isinstance(self.inner, SocketChannel)
        return self.inner.receive_from_socket(receive)

    def send_to_socket(self, send: Callable[[int], int]) -> int:
        assert isinstance(self.inner, SocketChannel)
        return send(self.inner._socket.fileno())


class BreaksLookLikeEnds(Proxy):
    def receive_into(self, view: memoryview) -> int:
        try:
            return self.inner.receive_into(view)
        except ChannelError:
            return 0


class Queues(Proxy):
    """Accepts everything, and sends it later."""

    def __init__(self, inner: Channel) -> None:
        super().__init__(inner)
        self.queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        try:
            while (data := self.queue.get()) is not None:
                self.inner.send(data)
            self.inner.send_eof()
        except ChannelError:
            return

    def send(self, *parts: Buffer) -> None:
        self.queue.put(b"".join(parts))

    def send_eof(self) -> None:
        self.queue.put(None)

    def close(self) -> None:
        self.queue.put(None)
        self.inner.close()


class SendsLater(Proxy):
    """Keeps a small part by reference until the next call."""

    def __init__(self, inner: Channel) -> None:
        super().__init__(inner)
        self.kept: tuple[Buffer, ...] = ()

    def send(self, *parts: Buffer) -> None:
        kept, self.kept = self.kept, parts
        self.inner.send(*kept)

    def send_eof(self) -> None:
        self.send()
        self.inner.send_eof()

    def close(self) -> None:
        self.inner.close()


class WaitsForMore(Proxy):
    """Waits until the whole view is full."""

    def receive_into(self, view: memoryview) -> int:
        got = 0
        while got < len(view) and (count := self.inner.receive_into(view[got:])):
            got += count
        return got


class AbortDoesNotWake(Proxy):
    def abort(self) -> None:
        pass


class CloseDoesNotWake(Proxy):
    def close(self) -> None:
        OPEN.append(self.inner)


class AlwaysReadable(Proxy):
    def wait_readable(self, seconds: float) -> bool:
        return True


class EndsBothWays(Proxy):
    def send_eof(self) -> None:
        self.inner.send_eof()
        self.receive_into = lambda view: 0  # type: ignore[method-assign]  # the fault itself


class EndsOnce(Proxy):
    ended = False

    def receive_into(self, view: memoryview) -> int:
        if self.ended:
            raise ChannelError("there was an end already")
        count = self.inner.receive_into(view)
        self.ended = count == 0
        return count


class FailsAltogether(Proxy):
    """Raises the first error of any call in all others."""

    error: ChannelError | None = None

    def send(self, *parts: Buffer) -> None:
        try:
            self.inner.send(*parts)
        except ChannelError as error:
            self.error = error
            raise

    def receive_into(self, view: memoryview) -> int:
        if self.error:
            raise self.error
        return self.inner.receive_into(view)


class CloseThrowsAway(Proxy):
    """Holds the last byte back for the next send, which never comes."""

    def send(self, *parts: Buffer) -> None:
        self.inner.send(b"".join(parts)[:-1])

    def close(self) -> None:
        self.inner.abort()
        self.inner.close()


class LeaksDescriptors(Proxy):
    def __init__(self, inner: Channel) -> None:
        super().__init__(inner)
        LEAKED.append(os.dup(0))


class IgnoresInterrupts(Wrapped):
    def accept(self, interrupt: Interrupt) -> Channel:
        return super().accept(DEAF)


class KeepsListening(Wrapped):
    def close(self) -> None:
        LISTENING.append(self.inner)


DEAF = Interrupt()
LEAKED: list[int] = []
LISTENING: list[Listener] = []
OPEN: list[Channel] = []
ONE_WAY = TransportFeatures(return_path=False, multi_channel=True)


@dataclass(frozen=True)
class Fault:
    transport: TransportFactory
    caught_by: str
    says: str


FAULTS = {
    "loses-bytes": Fault(faulty(LosesBytes), "streams-whole-and-in-order", "they differ from byte"),
    "reorders": Fault(faulty(Reorders), "streams-whole-and-in-order", "they differ from byte"),
    "few-parts": Fault(faulty(TakesFewParts), "takes-parts-of-every-kind", "OSError: .* Invalid argument"),
    "few-pieces": Fault(faulty(SendsFewPieces), "moves-memory-as-it-lies", "did not end within"),
    "pieces-reversed": Fault(faulty(FillsFromTheEnd), "moves-memory-as-it-lies", "they differ from byte"),
    "waits-for-all-pieces": Fault(faulty(WaitsForAllPieces), "moves-memory-as-it-lies", "did not end within"),
    "later": Fault(faulty(SendsLater), "takes-parts-of-every-kind", ""),
    "lends-once": Fault(faulty(LendsOnce), "lends-its-socket", "BlockingIOError"),
    "lends-for-one-send": Fault(faulty(LendsForOneSend), "lends-its-socket", "BlockingIOError"),
    "lends-another": Fault(faulty(LendsAnother), "lends-its-socket", "sent 12 bytes and received"),
    "fills-views": Fault(faulty(WaitsForMore), "delivers-without-delay", "did not end within"),
    "queues": Fault(faulty(Queues), "holds-back-a-fast-sender", "MiB that were not read"),
    "readable": Fault(faulty(AlwaysReadable), "waits-for-bytes", "before anything was sent"),
    "break-is-end": Fault(faulty(BreaksLookLikeEnds), "shows-a-break-as-an-error", "got no error"),
    "abort-receive": Fault(faulty(AbortDoesNotWake), "abort-wakes-a-receiver", "did not end within"),
    "abort-send": Fault(faulty(AbortDoesNotWake), "abort-wakes-a-sender", "did not end within"),
    "close-wakes-nothing": Fault(faulty(CloseDoesNotWake), "close-ends-blocked-calls", "did not end within"),
    "ends-both-ways": Fault(faulty(EndsBothWays), "half-closes-in-either-order", "received 0"),
    "ends-once": Fault(faulty(EndsOnce), "shows-the-end-for-ever", "there was an end already"),
    "all-fails": Fault(faulty(FailsAltogether), "receives-last-words-after-a-failed-send", "ChannelError"),
    "close-loses": Fault(faulty(CloseThrowsAway), "delivers-before-it-closes", "ChannelError"),
    "leaks": Fault(faulty(LeaksDescriptors), "says-what-it-is", "left behind: descriptor"),
    "deaf-listener": Fault(faulty(listener=IgnoresInterrupts), "interrupt-ends-accept", "did not end within"),
    "features-lie": Fault(faulty(features=ONE_WAY), "says-what-it-is", "has_return_path is True"),
    "keeps-listening": Fault(faulty(listener=KeepsListening), "stops-listening", "the address is in use"),
    "accepts-on": Fault(faulty(listener=KeepsListening), "closing-a-listener-ends-accept", "did not end within"),
    "accepts-anything": Fault(faulty(), "refuses-wrong-uris", "expected UriError, got no error"),
}


@pytest.fixture(autouse=True)
def _short_deadlines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the kit give up soon, and clean up after the faulty transports."""
    before = tasks.Possessions.now()
    with monkeypatch.context() as short:
        short.setattr(tasks, "DEADLINE", 1.0)
        yield
    before.assert_no_more()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_name(name: str) -> None:
    fault = FAULTS[name]
    wrong = ("tcp:127.0.0.1:0",) if name == "accepts-anything" else ()
    case = TransportCase(transport=fault.transport, listen=lambda: "tcp:127.0.0.1:0", wrong=wrong)
    with pytest.raises(AssertionError, match=rf"^{fault.caught_by}: .*{fault.says}") as caught:
        check_transport(case, only=[fault.caught_by])
    assert "\n" not in str(caught.value)
    while LEAKED:
        os.close(LEAKED.pop())
    while LISTENING:
        LISTENING.pop().close()
    while OPEN:
        OPEN.pop().close()


def test_what_is_right_passes_and_is_told() -> None:
    case = TransportCase(transport=faulty(), listen=lambda: "tcp:127.0.0.1:0", stream_bytes=1 << 20)
    done = check_transport(case, only=["says-what-it-is", "interrupt-ends-a-stuck-connect"])
    assert done == ["says-what-it-is"]  # the case has no place where a dial is stuck


def test_what_applies_is_known_before_anything_is_made() -> None:
    def never() -> str:
        raise AssertionError("something was made")

    live = TransportCase(transport=faulty(), listen=never)
    told = set(CHECKS) - set(applicable(live))
    assert told == {"names-a-destination-that-is-not-there", "interrupt-ends-a-stuck-connect"}
    one_way = TransportCase(
        transport=faulty(), listen=never, features=ONE_WAY, refused="tcp:127.0.0.1:1", shows_breaks=False
    )
    assert "names-a-destination-that-is-not-there" in applicable(one_way)
    assert not {"half-closes-in-either-order", "shows-a-break-as-an-error"} & set(applicable(one_way))
    with pytest.raises(AssertionError, match="give the case its `features`"):
        applicable(TransportCase(transport=lambda uri, context: TcpTransport(uri, context), listen=never))


def test_features_that_the_case_has_wrong_are_no_pass() -> None:
    case = TransportCase(transport=faulty(), listen=lambda: "tcp:127.0.0.1:0", features=ONE_WAY)
    with pytest.raises(AssertionError, match=r"the transport says .*return_path=True.*, the case .*return_path=False"):
        check_transport(case, only=["says-what-it-is"])


def test_an_unknown_check_is_no_pass() -> None:
    with pytest.raises(AssertionError, match="no check is called nonsense"):
        check_transport(TransportCase(transport=faulty(), listen=lambda: "tcp:127.0.0.1:0"), only=["nonsense"])


def test_every_check_has_a_sentence() -> None:
    assert all(function.__doc__ for function, _ in CHECKS.values())
