"""The contract kit for transports: run it on yours, and what corefw.channel promises holds.

    from corefw.testing.transport import CHECKS, TransportCase, check_transport

    CASE = TransportCase(transport=TcpTransport, listen=lambda: "tcp:127.0.0.1:0", wrong=("tcp:nohost",))

    @pytest.mark.parametrize("check", CHECKS)
    def test_contract(check):
        check_transport(CASE, only=[check])

The law: every check states one promise of the interface, finds out by using both ends for real, and fails with an
AssertionError that says in one line what was promised and what happened. After each of them nothing may be left behind:
no descriptor, process or thread. It needs no test framework.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from enum import Flag, auto
from typing import Final, TypeVar

from corefw.channel import Channel, TransportFeatures, receive_exactly
from corefw.errors import ChannelError, Interrupted, UriError
from corefw.testing.ends import (
    MIB,
    Flood,
    TransportCase,
    Workbench,
    pattern,
    raises,
    receive_all,
    same,
    send_chunks,
    told,
    transferred,
)
from corefw.testing.tasks import Possessions, Task, private_memory, wait_until
from corefw.uri import MigrationUri

_T = TypeVar("_T")

__all__ = ["CHECKS", "TransportCase", "check_transport"]

CHECK_DEADLINE: Final = 90.0
"""Seconds for one whole check."""

UNREAD_LIMIT: Final = 32 * MIB
"""How much may be on its way, in buffers here, in the kernel and on the far side, when nobody reads."""

MEMORY_LIMIT: Final = 24 * MIB
"""How much this process may grow by that."""


class Need(Flag):
    """What a case must have for a check to apply."""

    NOTHING = 0
    LIVE = auto()
    RETURN_PATH = auto()
    MANY = auto()  # a listener takes one peer after the other
    OWN_LISTENER = auto()
    SHOWS_BREAKS = auto()
    REFUSED = auto()
    STUCK = auto()


def _has(case: TransportCase, features: TransportFeatures) -> Need:
    own = case.listen_transport is None
    had = {
        Need.LIVE: not case.stored,
        Need.RETURN_PATH: features.return_path,
        Need.MANY: features.multi_channel,
        Need.OWN_LISTENER: own and features.multi_channel,
        Need.SHOWS_BREAKS: case.shows_breaks,
        Need.REFUSED: case.refused is not None,
        Need.STUCK: case.stuck is not None,
    }
    return Need(sum(need.value for need, there in had.items() if there))


Check = Callable[[Workbench], None]
CHECKS: Final[dict[str, tuple[Check, Need]]] = {}
"""Every check by name, in the order in which they run, and what it needs."""


def _check(need: Need = Need.NOTHING) -> Callable[[Check], Check]:
    def enter(function: Check) -> Check:
        CHECKS[function.__name__.removeprefix("_").replace("_", "-")] = (function, need)
        return function

    return enter


def check_transport(case: TransportCase, *, only: Collection[str] | None = None) -> list[str]:
    """Run every check that applies to this transport (or `only` these); the names of those that were run.

    Raises AssertionError on the first promise that is broken. What a transport cannot do (a return path, several
    channels) it says in its features, and is not asked for.
    """
    unknown = set(only or ()) - CHECKS.keys()
    assert not unknown, f"no check is called {', '.join(sorted(unknown))}: expected some of {', '.join(CHECKS)}"
    features = _run(case, "the first pair of channels", _first_pair, None)
    done = []
    for name, (function, need) in CHECKS.items():
        if (only is None or name in only) and need in _has(case, features):
            _run(case, name, function, Possessions.now())
            done.append(name)
    return done


def _run(case: TransportCase, name: str, check: Callable[[Workbench], _T], before: Possessions | None) -> _T:
    """One check in a thread of its own, on a bench of its own."""
    bench = Workbench(case)
    try:
        found = Task("the check", check, bench).result(CHECK_DEADLINE)
        bench.close()
        if before:
            before.assert_no_more()
        return found
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{name}: {told(error)}") from error
    finally:
        bench.close()


def _first_pair(bench: Workbench) -> TransportFeatures:
    """What the transport says of itself. It also makes whatever a library makes once for a whole process."""
    if bench.case.stored:
        bench.stored(lambda channel: channel.send(b"x"))
        return bench.outgoing(bench.case.listen()).features
    listener = bench.listener()
    features = bench.dial(listener).features
    bench.pair(listener)
    return features


# -- what it says of itself ----------------------------------------------------------------------------------------


@_check()
def _refuses_wrong_uris(bench: Workbench) -> None:
    """A wrong URI raises UriError when the transport is made, before anything is started."""
    for text in bench.case.wrong:
        error = raises(UriError, f"making a transport for '{text}'", bench.outgoing, text)
        assert text in str(error), f"the error for '{text}' does not show the URI: {error}"


@_check(Need.LIVE)
def _says_what_it_is(bench: Workbench) -> None:
    """Features, peers and return paths are told, and agree."""
    listener = bench.listener()
    assert isinstance(listener.uri, MigrationUri), f"listener.uri is {listener.uri!r}, expected a MigrationUri"
    transport = bench.dial(listener)
    out, into = bench.pair(listener)
    for channel in (out, into):
        assert isinstance(channel.peer, str) and channel.peer, f"peer is {channel.peer!r}, expected some text"
        assert channel.has_return_path == transport.features.return_path, (
            f"has_return_path is {channel.has_return_path}, the transport's features say "
            f"{transport.features.return_path}"
        )


# -- bytes ---------------------------------------------------------------------------------------------------------


@_check()
def _streams_whole_and_in_order(bench: Workbench) -> None:
    """Many bytes, sent and received in pieces of any size, arrive as they were, each way."""
    data = pattern(bench.case.stream_bytes)
    if bench.case.stored:
        return same(receive_all(bench.stored(lambda channel: send_chunks(channel, data))), data)
    for way, sender, receiver in bench.ways():
        sending = Task(f"sending {way}", _send_and_end, sender, data)
        same(transferred(sending, Task(f"receiving {way}", receive_all, receiver), CHECK_DEADLINE), data)
    return None


@_check()
def _takes_parts_of_every_kind(bench: Workbench) -> None:
    """No part, empty parts, more parts than the system takes at once, every type; they may change after the call."""
    reused = bytearray(b"reused buffer")
    many = [bytes([n % 251]) * (n % 5) for n in range(5000)]

    def send(channel: Channel) -> None:
        channel.send()
        channel.send(b"")
        channel.send(b"", b"one", bytearray(), bytearray(b"two"), memoryview(b"-three-")[1:6], b"")
        channel.send(reused)
        reused[:] = b"#" * len(reused)
        channel.send(*many)

    expected = b"onetwothree" + b"reused buffer" + b"".join(many)
    if bench.case.stored:
        return same(receive_all(bench.stored(send)), expected)
    for way, sender, receiver in bench.ways():
        reused[:] = b"reused buffer"
        sending = Task(f"sending {way}", send, sender)
        room = memoryview(bytearray(len(expected)))
        transferred(sending, Task(f"receiving {way}", receive_exactly, receiver, room))
        same(room, expected)
    return None


@_check(Need.LIVE)
def _delivers_without_delay(bench: Workbench) -> None:
    """A few bytes are received while nothing follows, in a view that has room for more."""
    for way, sender, receiver in bench.ways():
        for word in (b"a", b"word"):
            sender.send(word)
            view = memoryview(bytearray(MIB))
            receiving = Task(f"receiving {way}", receive_exactly, receiver, view[: len(word)])
            receiving.result()
            same(view[: len(word)], word)
        sender.send(b"short")
        assert receiver.wait_readable(10), f"{way}: wait_readable is False though bytes were sent"
        count = Task(f"receiving into a large view {way}", receiver.receive_into, view).result()
        assert 1 <= count <= 5, f"{way}: receive_into returned {count} for 5 bytes"


@_check(Need.LIVE)
def _waits_for_bytes(bench: Workbench) -> None:
    """wait_readable is False while there is nothing, True with the first byte, and at the end."""
    for way, sender, receiver in bench.ways():
        assert not receiver.wait_readable(0), f"{way}: wait_readable(0) is True before anything was sent"
        assert not receiver.wait_readable(0.05), f"{way}: wait_readable is True before anything was sent"
        sender.send(b"x")
        assert receiver.wait_readable(10), f"{way}: wait_readable is False though a byte was sent"
        receive_exactly(receiver, memoryview(bytearray(1)))
        assert not receiver.wait_readable(0.05), f"{way}: wait_readable is True though all was received"
        sender.send_eof()
        assert receiver.wait_readable(10), f"{way}: wait_readable is False at the end"
        assert receiver.receive_into(memoryview(bytearray(1))) == 0, f"{way}: bytes came out of nowhere"


@_check(Need.LIVE | Need.RETURN_PATH)
def _goes_both_ways_at_once(bench: Workbench) -> None:
    """One thread sends while another receives, on both ends."""
    out, into = bench.pair()
    there, back = pattern(bench.case.stream_bytes // 4), pattern(bench.case.stream_bytes // 4 + 1)
    sending = [Task("sending", _send_and_end, out, there), Task("sending back", _send_and_end, into, back)]
    receiving = [Task("receiving", receive_all, into), Task("receiving back", receive_all, out)]
    for sent, received, data in zip(sending, receiving, (there, back), strict=True):
        same(transferred(sent, received, CHECK_DEADLINE), data)


@_check(Need.LIVE)
def _holds_back_a_fast_sender(bench: Workbench) -> None:
    """A receiver that does not read blocks the sender; memory stays bounded, and nothing is lost."""
    chunk = pattern(256 << 10)
    for way, sender, receiver in bench.ways():
        before = private_memory()
        flood = Flood(sender, f"sending {way}", chunk, 2 * UNREAD_LIMIT)
        unread = flood.blocked()
        assert unread <= UNREAD_LIMIT, (
            f"{way}: the sender was let to send {unread / MIB:.0f} MiB that nobody had read, "
            f"expected it to block before {UNREAD_LIMIT // MIB} MiB"
        )
        grown = private_memory() - before
        assert grown <= MEMORY_LIMIT, f"{way}: {grown / MIB:.0f} MiB of memory hold what nobody has read"
        total = Task(f"receiving {way}", _count_repeats, receiver, chunk).result(CHECK_DEADLINE)
        flood.task.result()
        assert total == flood.sent, f"{way}: sent {flood.sent} bytes and received {total} after a pause"


def _send_and_end(channel: Channel, data: bytes) -> None:
    send_chunks(channel, data)
    channel.send_eof()


def _count_repeats(channel: Channel, chunk: bytes) -> int:
    """Receive `chunk` again and again until the end; how many bytes that were."""
    room = memoryview(bytearray(len(chunk)))
    for number in itertools.count():
        filled = 0
        while filled < len(chunk):
            count = channel.receive_into(room[filled:])
            if count == 0:
                return number * len(chunk) + filled
            filled += count
        same(room, chunk)
    raise AssertionError("count() ended")


# -- ends ----------------------------------------------------------------------------------------------------------


@_check()
def _shows_the_end_for_ever(bench: Workbench) -> None:
    """All bytes sent before send_eof arrive; then receive_into returns 0, again and again."""
    if bench.case.stored:
        channels = [("reading it again", bench.stored(lambda channel: channel.send(b"tail")))]
    else:
        channels = []
        for way, sender, receiver in bench.ways():
            sender.send(b"tail")
            sender.send_eof()
            channels.append((way, receiver))
    for way, receiver in channels:
        same(Task(f"receiving {way}", receive_all, receiver).result(), b"tail")
        for _ in range(3):
            again = Task(f"receiving at the end {way}", receiver.receive_into, memoryview(bytearray(8))).result()
            assert again == 0, f"{way}: receive_into returned {again} after the end"


@_check(Need.LIVE | Need.RETURN_PATH)
def _half_closes_in_either_order(bench: Workbench) -> None:
    """send_eof ends one direction; the other goes on until it is ended too."""
    for turned in (False, True):
        first, second = reversed(bench.pair()) if turned else bench.pair()
        first.send(b"last words")
        first.send_eof()
        same(Task("receiving to the first end", receive_all, second).result(), b"last words")
        data = pattern(MIB)
        sending = Task("sending after the peer's end", _send_and_end, second, data)
        same(transferred(sending, Task("receiving after send_eof", receive_all, first)), data)


@_check(Need.LIVE)
def _delivers_before_it_closes(bench: Workbench) -> None:
    """What was sent arrives although the sender closes at once; close may be called again, and by `with`."""
    for unread in (b"", b"never read"):
        for way, sender, receiver in bench.ways():
            if unread and not receiver.has_return_path:
                continue
            if unread:
                receiver.send(unread)
            data = pattern(2 * MIB)
            sending = Task(f"sending and closing {way}", _send_and_close, sender, data)
            room = memoryview(bytearray(len(data)))
            transferred(sending, Task(f"receiving {way}", receive_exactly, receiver, room))
            same(room, data)
            with receiver:
                pass
            receiver.close()


def _send_and_close(channel: Channel, data: bytes) -> None:
    channel.send(data)
    channel.close()
    channel.close()


# -- abort and interrupts ------------------------------------------------------------------------------------------


@_check(Need.LIVE)
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


@_check(Need.LIVE)
def _abort_wakes_a_sender(bench: Workbench) -> None:
    """abort() makes a blocked send and every later one raise Interrupted."""
    for way, sender, _ in bench.ways():
        flood = Flood(sender, f"send {way} after abort()", pattern(256 << 10), 2 * UNREAD_LIMIT)
        flood.blocked(0.2)
        sender.abort()
        _was_interrupted(flood.task)
        raises(Interrupted, f"a later send {way} after abort()", sender.send, b"x")
        sender.close()
        sender.abort()


@_check(Need.OWN_LISTENER)
def _interrupt_ends_accept(bench: Workbench) -> None:
    """An Interrupt ends accept(), whether it is set before or while it waits; the listener is good afterwards."""
    listener, interrupt = bench.listener(), bench.interrupt()
    blocked = Task("accept after Interrupt.set()", listener.accept, interrupt)
    blocked.let_block()
    interrupt.set()
    _was_interrupted(blocked)
    raises(Interrupted, "accept with an Interrupt that is set", listener.accept, interrupt)
    bench.pair(listener)


@_check(Need.LIVE)
def _interrupt_ends_connect(bench: Workbench) -> None:
    """connect() with an Interrupt that is set makes no channel, and spoils nothing for the next."""
    listener, interrupt = bench.listener(), bench.interrupt()
    interrupt.set()
    raises(Interrupted, "connect with an Interrupt that is set", bench.dial(listener).connect, interrupt)
    bench.pair(listener)


@_check(Need.STUCK)
def _interrupt_ends_a_stuck_connect(bench: Workbench) -> None:
    """An Interrupt ends a connect() to a host that does not answer."""
    assert bench.case.stuck
    with bench.case.stuck() as uri:
        interrupt = bench.interrupt()
        blocked = Task("connect after Interrupt.set()", bench.outgoing(uri).connect, interrupt)
        blocked.let_block(0.3)
        assert blocked.running, f"connect to '{uri}' was to be stuck, it ended with {told(blocked.error())}"
        interrupt.set()
        _was_interrupted(blocked)


def _was_interrupted(task: Task[_T]) -> None:
    error = task.error()
    assert isinstance(error, Interrupted), f"{task.what}: expected Interrupted, got {told(error)}"


# -- failures ------------------------------------------------------------------------------------------------------


@_check(Need.LIVE | Need.SHOWS_BREAKS)
def _shows_a_break_as_an_error(bench: Workbench) -> None:
    """A stream that was cut raises ChannelError at the receiver, each time it is asked; it never looks like an end."""
    for way, sender, receiver in bench.ways():
        sender.send(b"half of it")
        receive_exactly(receiver, memoryview(bytearray(10)))
        sender.abort()
        sender.close()
        for attempt in ("a receive", "the next receive"):
            raises(ChannelError, f"{attempt} {way} from a peer that aborted", _receive_to_end, receiver)


@_check(Need.LIVE)
def _sending_to_nobody_fails(bench: Workbench) -> None:
    """A sender whose peer has gone gets ChannelError, after what the buffers on the way hold."""
    for way, sender, receiver in bench.ways():
        sender.send(b"x")
        receive_exactly(receiver, memoryview(bytearray(1)))
        receiver.abort()
        receiver.close()

        flood = Flood(sender, f"sending {way} to a peer that has gone", pattern(MIB), 4 * UNREAD_LIMIT)
        error = flood.task.error()
        assert isinstance(error, ChannelError), f"{flood.task.what}: expected ChannelError, got {told(error)}"
        assert not isinstance(error, Interrupted), f"nobody aborted this end, yet it raised {told(error)}"


@_check(Need.REFUSED)
def _names_a_destination_that_is_not_there(bench: Workbench) -> None:
    """Dialling where nobody listens raises ChannelError that names the URI."""
    assert bench.case.refused
    error = raises(ChannelError, "connect", bench.outgoing(bench.case.refused).connect, bench.interrupt())
    assert bench.case.refused in str(error), f"the error does not show '{bench.case.refused}': {error}"


def _receive_to_end(channel: Channel) -> None:
    while channel.receive_into(memoryview(bytearray(65536))):
        pass


# -- listeners -----------------------------------------------------------------------------------------------------


@_check(Need.LIVE | Need.MANY)
def _keeps_channels_apart(bench: Workbench) -> None:
    """One listener serves several peers at once, whoever ends first."""
    listener = bench.listener()
    pairs = [bench.pair(listener) for _ in range(3)]
    for number, (out, _) in enumerate(pairs):
        out.send(b"channel %d" % number)
    for number, (out, into) in reversed(list(enumerate(pairs))):
        out.send_eof()
        same(Task("receiving", receive_all, into).result(), b"channel %d" % number)


@_check(Need.OWN_LISTENER)
def _refuses_an_address_in_use(bench: Workbench) -> None:
    """A second listener at the same address raises ChannelError and does not disturb the first."""
    listener = bench.listener()
    error = raises(ChannelError, "listening twice at one address", bench.listener, str(listener.uri))
    assert str(listener.uri) in str(error), f"the error does not show '{listener.uri}': {error}"
    bench.pair(listener)


@_check(Need.OWN_LISTENER)
def _stops_listening(bench: Workbench) -> None:
    """close() ends listening, twice does no harm; accepted channels go on, and the address is free for the next."""
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
