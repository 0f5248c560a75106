"""Checks of aborts, interrupts, broken connections and listeners."""

from __future__ import annotations

from typing import TypeVar

from corefw.channel import Channel, receive_exactly
from corefw.errors import ChannelError, Interrupted
from corefw.testing.checks import UNREAD_LIMIT, Need, check
from corefw.testing.ends import MIB, Flood, Workbench, raises, receive_all, same, shows
from corefw.testing.tasks import Task, described, wait_until

_T = TypeVar("_T")

# -- abort and interrupts ------------------------------------------------------------------------------------------


@check(Need.LIVE)
def _abort_wakes_a_receiver(bench: Workbench) -> None:
    """abort() makes a blocked receive, a blocked wait and every later call raise Interrupted."""
    for way, _, receiver in bench.ways():
        blocked = Task(f"receive {way} after abort()", receiver.receive_into, memoryview(bytearray(8)))
        blocked.let_block()
        receiver.abort()
        _was_interrupted(blocked)
        receiver.abort()
        later = memoryview(bytearray(8))
        raises(Interrupted, f"a later receive {way} after abort()", receiver.receive_into, later)
        raises(Interrupted, f"a later wait {way} after abort()", receiver.wait_readable, 10)
    for way, _, receiver in bench.ways():
        waiting = Task(f"wait_readable {way} after abort()", receiver.wait_readable, 600)
        waiting.let_block()
        receiver.abort()
        _was_interrupted(waiting)


@check(Need.LIVE)
def _abort_wakes_a_sender(bench: Workbench) -> None:
    """abort() makes a blocked send and every later one raise Interrupted."""
    for way, sender, _ in bench.ways():
        flood = Flood(sender, f"send {way} after abort()", 256 << 10, 2 * UNREAD_LIMIT)
        flood.blocked(0.2)
        sender.abort()
        _was_interrupted(flood.task)
        raises(Interrupted, f"a later send {way} after abort()", sender.send, b"x")
        sender.close()
        sender.abort()


@check(Need.LIVE)
def _close_ends_blocked_calls(bench: Workbench) -> None:
    """close() makes a blocked receive, wait or send and every later one raise Interrupted."""
    for way, _, receiver in bench.ways():
        blocked = Task(f"receive {way} after close()", receiver.receive_into, memoryview(bytearray(8)))
        blocked.let_block()
        receiver.close()
        _was_interrupted(blocked)
        raises(Interrupted, f"a later receive {way} after close()", receiver.receive_into, memoryview(bytearray(8)))
        raises(Interrupted, f"a later wait {way} after close()", receiver.wait_readable, 10)
    for way, _, receiver in bench.ways():
        waiting = Task(f"wait_readable {way} after close()", receiver.wait_readable, 600)
        waiting.let_block()
        receiver.close()
        _was_interrupted(waiting)
    for way, sender, _ in bench.ways():
        flood = Flood(sender, f"send {way} after close()", 256 << 10, 2 * UNREAD_LIMIT)
        flood.blocked(0.2)
        Task(f"close() {way} while a send is blocked", sender.close).result()
        _was_interrupted(flood.task)
        raises(Interrupted, f"a later send {way} after close()", sender.send, b"x")


@check(Need.OWN_LISTENER)
def _closing_a_listener_ends_accept(bench: Workbench) -> None:
    """close() of a listener makes a blocked accept and every later one raise ChannelError."""
    listener = bench.listener()
    blocked = Task("accept after the listener's close()", listener.accept, bench.interrupt())
    blocked.let_block()
    listener.close()
    error = blocked.error()
    assert isinstance(error, ChannelError), f"{blocked.what}: expected ChannelError, got {described(error)}"
    raises(ChannelError, "a later accept after the listener's close()", listener.accept, bench.interrupt())


@check(Need.OWN_LISTENER)
def _interrupt_ends_accept(bench: Workbench) -> None:
    """An Interrupt ends accept(), whether it is set before or while it waits; the listener still works afterwards."""
    listener, interrupt = bench.listener(), bench.interrupt()
    blocked = Task("accept after Interrupt.set()", listener.accept, interrupt)
    blocked.let_block()
    interrupt.set()
    _was_interrupted(blocked)
    raises(Interrupted, "accept with an Interrupt that is set", listener.accept, interrupt)
    bench.pair(listener)


@check(Need.LIVE)
def _interrupt_ends_connect(bench: Workbench) -> None:
    """connect() with an Interrupt that is set raises Interrupted, and the next connect() works."""
    listener, interrupt = bench.listener(), bench.interrupt()
    interrupt.set()
    raises(Interrupted, "connect with an Interrupt that is set", bench.dial(listener).connect, interrupt)
    bench.pair(listener)


@check(Need.STUCK)
def _interrupt_ends_a_stuck_connect(bench: Workbench) -> None:
    """An Interrupt ends a connect() to a host that does not answer."""
    assert bench.case.stuck
    with bench.case.stuck() as uri:
        interrupt = bench.interrupt()
        blocked = Task("connect after Interrupt.set()", bench.outgoing(uri).connect, interrupt)
        blocked.let_block(0.3)
        assert blocked.running, f"connect to '{uri}' was to be stuck, it ended with {described(blocked.error())}"
        interrupt.set()
        _was_interrupted(blocked)


def _was_interrupted(task: Task[_T]) -> None:
    error = task.error()
    assert isinstance(error, Interrupted), f"{task.what}: expected Interrupted, got {described(error)}"


# -- failures ------------------------------------------------------------------------------------------------------


@check(Need.LIVE | Need.SHOWS_BREAKS)
def _shows_a_break_as_an_error(bench: Workbench) -> None:
    """A stream that was cut raises ChannelError at the receiver, every time; it never looks like an end."""
    for way, sender, receiver in bench.ways():
        sender.send(b"half of it")
        receive_exactly(receiver, memoryview(bytearray(10)))
        sender.abort()
        sender.close()
        for attempt in ("a receive", "the next receive"):
            raises(ChannelError, f"{attempt} {way} from a peer that aborted", _receive_to_end, receiver)


@check(Need.LIVE)
def _sending_to_nobody_fails(bench: Workbench) -> None:
    """Sending to a peer that has gone raises ChannelError, once the buffers on the way are full."""
    for way, sender, receiver in bench.ways():
        sender.send(b"x")
        receive_exactly(receiver, memoryview(bytearray(1)))
        receiver.abort()
        receiver.close()

        flood = Flood(sender, f"sending {way} to a peer that has gone", MIB, 4 * UNREAD_LIMIT)
        error = flood.task.error()
        assert isinstance(error, ChannelError), f"{flood.task.what}: expected ChannelError, got {described(error)}"
        assert not isinstance(error, Interrupted), f"this end was not aborted, yet it raised {described(error)}"


@check(Need.LIVE | Need.RETURN_PATH)
def _receives_last_words_after_a_failed_send(bench: Workbench) -> None:
    """After a failed send, what the peer sent before it went can still be received."""
    for way, sender, receiver in bench.ways():
        receiver.send(b"last words")
        receiver.close()
        flood = Flood(sender, f"sending {way} to a peer that has closed", MIB, 4 * UNREAD_LIMIT)
        error = flood.task.error()
        assert isinstance(error, ChannelError), f"{flood.task.what}: expected ChannelError, got {described(error)}"
        room = memoryview(bytearray(10))
        Task("receiving after a send that failed", receive_exactly, sender, room).result()
        same(room, b"last words")


@check(Need.REFUSED)
def _names_a_destination_that_is_not_there(bench: Workbench) -> None:
    """Dialling a URI without a listener raises ChannelError that names it."""
    assert bench.case.refused
    error = raises(ChannelError, "connect", bench.outgoing(bench.case.refused).connect, bench.interrupt())
    assert shows(error, bench.case.refused), f"the error does not show '{bench.case.refused}': {error}"


def _receive_to_end(channel: Channel) -> None:
    while channel.receive_into(memoryview(bytearray(65536))):
        pass


# -- listeners -----------------------------------------------------------------------------------------------------


@check(Need.LIVE | Need.MANY)
def _keeps_channels_apart(bench: Workbench) -> None:
    """One listener serves several peers at once, which may end in any order."""
    listener = bench.listener()
    pairs = [bench.pair(listener) for _ in range(3)]
    for number, (out, _) in enumerate(pairs):
        out.send(b"channel %d" % number)
    for number, (out, into) in reversed(list(enumerate(pairs))):
        out.send_eof()
        same(Task("receiving", receive_all, into).result(), b"channel %d" % number)


@check(Need.OWN_LISTENER)
def _refuses_an_address_in_use(bench: Workbench) -> None:
    """A second listener at the same address raises ChannelError and does not disturb the first."""
    listener = bench.listener()
    error = raises(ChannelError, "listening twice at one address", bench.listener, str(listener.uri))
    assert shows(error, str(listener.uri)), f"the error does not show '{listener.uri}': {error}"
    bench.pair(listener)


@check(Need.OWN_LISTENER)
def _stops_listening(bench: Workbench) -> None:
    """A listener's close() may be called twice; accepted channels go on, and the address is free again."""
    listener = bench.listener()
    out, into = bench.pair(listener)
    listener.close()
    listener.close()
    out.send(b"still here")
    out.send_eof()
    same(Task("receiving after the listener was closed", receive_all, into).result(), b"still here")
    for channel in (out, into):
        channel.close()
    again: list[object] = []

    def listens() -> bool:
        try:
            again.append(bench.listener(str(listener.uri)))
        except ChannelError as error:
            again.append(error)
        return not isinstance(again[-1], ChannelError)

    assert wait_until(listens), f"listening at '{listener.uri}' again: {again[-1]}"
