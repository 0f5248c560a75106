"""Checks of features, bytes and ends, without errors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from corefw.channel import Channel, ReceivesFromSocket, ReceivesMemory, SendsMemory, SendsToSocket, receive_exactly
from corefw.errors import UriError
from corefw.testing.checks import MEMORY_LIMIT, UNREAD_LIMIT, Need, check
from corefw.testing.ends import (
    MIB,
    Flood,
    Workbench,
    flood_chunk,
    pattern,
    raises,
    receive_all,
    same,
    send_chunks,
    shows,
    transferred,
)
from corefw.testing.kit import CHECK_DEADLINE
from corefw.testing.tasks import Task, private_memory
from corefw.uri import MigrationUri

# -- features and URIs ----------------------------------------------------------------------------------------


@check()
def _refuses_wrong_uris(bench: Workbench) -> None:
    """The constructor refuses a wrong URI with UriError."""
    for text in bench.case.wrong:
        error = raises(UriError, f"making a transport for '{text}'", bench.outgoing, text)
        assert shows(error, text), f"the error for '{text}' does not show the URI: {error}"


@check(Need.LIVE)
def _says_what_it_is(bench: Workbench) -> None:
    """The features, the peers' names and the channels' return paths agree."""
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


@check()
def _streams_whole_and_in_order(bench: Workbench) -> None:
    """Many bytes, sent and received in pieces of any size, arrive unchanged, in each direction."""
    data = pattern(bench.case.stream_bytes)
    if bench.case.stored:
        return same(receive_all(bench.stored(lambda channel: send_chunks(channel, data))), data)
    for way, sender, receiver in bench.ways():
        sending = Task(f"sending {way}", _send_and_end, sender, data)
        same(transferred(sending, Task(f"receiving {way}", receive_all, receiver), CHECK_DEADLINE), data)
    return None


@check()
def _takes_parts_of_every_kind(bench: Workbench) -> None:
    """send() accepts no part, empty parts, very many parts, and every type; they may change once it returns."""
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


@check(Need.LIVE)
def _moves_memory_as_it_lies(bench: Workbench) -> None:
    """SendsMemory and ReceivesMemory: pieces keep their order, also beyond what one call takes; a pause in the stream
    ends a receive, and the end is 0."""
    rows = np.frombuffer(pattern(3000 * 40), dtype=np.uint8).reshape(3000, 40)
    data = rows[::-1, :33].tobytes()
    for way, sender, receiver in bench.ways():
        if isinstance(sender, SendsMemory):
            sending = Task(f"sending memory {way}", sender.send_memory, _pieces(rows[::-1, :33]))
        else:
            sending = Task(f"sending {way}", sender.send, data)
        if isinstance(receiver, ReceivesMemory):
            got = Task(f"receiving into memory {way}", _receive_rows, receiver, len(data), 33).result()
        else:
            got = bytearray(len(data))
            Task(f"receiving {way}", receive_exactly, receiver, memoryview(got)).result()
        sending.result()
        same(got, data)
        sender.send_eof()
        if isinstance(receiver, ReceivesMemory):
            end = Task(f"receiving into memory at the end {way}", _receive_rows, receiver, 1, 1).result()
            assert not end, f"{way}: bytes came out of nowhere"


@check(Need.LIVE)
def _lends_its_socket(bench: Workbench) -> None:
    """ReceivesFromSocket and SendsToSocket: the function is called again until a byte was received or sent, and handles
    the stream's bytes unchanged; the end is 0."""
    for way, sender, receiver in bench.ways():
        if not isinstance(receiver, ReceivesFromSocket):
            continue
        view = memoryview(bytearray(MIB))
        calls = itertools.count()

        def receive(descriptor: int, view: memoryview = view, calls: Iterator[int] = calls) -> int:
            if next(calls) == 0:
                raise BlockingIOError
            return os.readv(descriptor, [view])

        if isinstance(sender, SendsToSocket):
            places = itertools.count()

            def send(descriptor: int, places: Iterator[int] = places) -> int:
                if next(places) == 0:
                    raise BlockingIOError
                return os.write(descriptor, b"first ")

            assert Task(f"sending {way}", sender.send_to_socket, send).result() == 6, f"{way}: 6 bytes went"
        else:
            sender.send(b"first ")
        got = bytes(view[: Task(f"receiving {way}", receiver.receive_from_socket, receive).result()])
        sender.send(b"second")
        sender.send_eof()
        while count := Task(f"receiving {way}", receiver.receive_from_socket, receive).result():
            got += bytes(view[:count])
        same(got, b"first second")


@check(Need.LIVE)
def _delivers_without_delay(bench: Workbench) -> None:
    """A few bytes are received at once, although the view has room for more."""
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


@check(Need.LIVE)
def _waits_for_bytes(bench: Workbench) -> None:
    """wait_readable is False and try_receive_into None until a byte or the end arrives."""
    byte = memoryview(bytearray(1))
    for way, sender, receiver in bench.ways():
        assert not receiver.wait_readable(0), f"{way}: wait_readable(0) is True before anything was sent"
        assert not receiver.wait_readable(0.05), f"{way}: wait_readable is True before anything was sent"
        assert receiver.try_receive_into(byte) is None, f"{way}: try_receive_into found a byte that was never sent"
        sender.send(b"x")
        assert receiver.wait_readable(10), f"{way}: wait_readable is False though a byte was sent"
        assert receiver.try_receive_into(byte) == 1, f"{way}: try_receive_into does not give the byte that is there"
        same(byte, b"x")
        assert not receiver.wait_readable(0.05), f"{way}: wait_readable is True though all was received"
        sender.send_eof()
        assert receiver.wait_readable(10), f"{way}: wait_readable is False at the end"
        assert receiver.try_receive_into(byte) == 0, f"{way}: try_receive_into does not give 0 at the end"
        assert receiver.receive_into(byte) == 0, f"{way}: bytes came out of nowhere"


@check(Need.LIVE | Need.RETURN_PATH)
def _goes_both_ways_at_once(bench: Workbench) -> None:
    """Both ends send and receive at the same time, in two threads each."""
    out, into = bench.pair()
    there, back = pattern(bench.case.stream_bytes // 4), pattern(bench.case.stream_bytes // 4 + 1)
    sending = [Task("sending", _send_and_end, out, there), Task("sending back", _send_and_end, into, back)]
    receiving = [Task("receiving", receive_all, into), Task("receiving back", receive_all, out)]
    for sent, received, data in zip(sending, receiving, (there, back), strict=True):
        same(transferred(sent, received, CHECK_DEADLINE), data)


@check(Need.LIVE)
def _holds_back_a_fast_sender(bench: Workbench) -> None:
    """A receiver that does not read blocks the sender; memory stays bounded and nothing is lost."""
    for way, sender, receiver in bench.ways():
        before = private_memory()
        flood = Flood(sender, f"sending {way}", 256 << 10, 2 * UNREAD_LIMIT)
        unread = flood.blocked()
        assert unread <= UNREAD_LIMIT, (
            f"{way}: the sender could send {unread / MIB:.0f} MiB that were not read, "
            f"expected it to block before {UNREAD_LIMIT // MIB} MiB"
        )
        grown = private_memory() - before
        assert grown <= MEMORY_LIMIT, f"{way}: {grown / MIB:.0f} MiB of memory hold data that was not read"
        total = Task(f"receiving {way}", _count_flood, receiver, 256 << 10).result(CHECK_DEADLINE)
        flood.task.result()
        assert total == flood.sent, f"{way}: sent {flood.sent} bytes and received {total} after a pause"


def _pieces(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Make a piece of each row."""
    made = np.empty((len(rows), 2), dtype=np.uint64)
    made[:, 0] = [row.ctypes.data for row in rows]
    made[:, 1] = rows.shape[1]
    return made


def _receive_rows(channel: ReceivesMemory, count: int, width: int) -> bytearray:
    """Receive `count` bytes, or all before the end, into separate pieces, with more room than needed."""
    got = bytearray()
    while len(got) < count:
        missing = -(-(count - len(got)) // width)
        room = np.zeros((missing + 5, 2 * width), dtype=np.uint8)
        received = channel.receive_memory(_pieces(room[:, :width]))
        if received == 0:
            break
        got += room[:, :width].tobytes()[:received]
    return got


def _send_and_end(channel: Channel, data: bytes) -> None:
    send_chunks(channel, data)
    channel.send_eof()


def _count_flood(channel: Channel, size: int) -> int:
    """Receive what a Flood sends until the end; returns the number of bytes."""
    room = memoryview(bytearray(size))
    for offset in itertools.count(0, size):
        filled = 0
        while filled < size:
            count = channel.receive_into(room[filled:])
            if count == 0:
                return offset + filled
            filled += count
        same(room, flood_chunk(offset, size))
    raise AssertionError("count() ended")


# -- ends ----------------------------------------------------------------------------------------------------------


@check()
def _shows_the_end_for_ever(bench: Workbench) -> None:
    """All bytes sent before send_eof arrive; then receive_into returns 0, every time."""
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


@check(Need.LIVE | Need.RETURN_PATH)
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


@check(Need.LIVE)
def _delivers_before_it_closes(bench: Workbench) -> None:
    """What was sent arrives even if the sender closes at once; close() may be called twice, and by `with`."""
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
