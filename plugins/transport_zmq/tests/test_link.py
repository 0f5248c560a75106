"""Two links without ZeroMQ in between: the protocol, and peers that violate it."""

from __future__ import annotations

import pytest
from corefw_transport_zmq.link import Link
from corefw_transport_zmq.protocol import (
    CHUNK,
    WINDOW,
    Kind,
    Message,
    ProtocolError,
    greeting,
    read_greeting,
    read_message,
    write_header,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.errors import ChannelError, Interrupted


def link() -> Link:
    made = Link("peer", lambda: None)
    made.open(WINDOW, answer=False)
    return made


def carry(sender: Link, receiver: Link) -> list[Message]:
    """Deliver all messages; return them."""
    messages = sender.outgoing()
    for message in messages:
        header = write_header(message)
        parts = [memoryview(header)] + ([memoryview(message.payload)] if len(message.payload) else [])
        receiver.handle(read_message(parts))
    return messages


def receive(receiver: Link, size: int = CHUNK) -> bytes:
    room = memoryview(bytearray(size))
    return bytes(room[: receiver.receive(room)])


# -- two that keep the rules -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=5000), st.booleans(), st.integers(1, 3000)), max_size=30))
def test_every_byte_arrives_in_order(pieces: list[tuple[bytes, bool, int]]) -> None:
    source, destination = link(), link()
    got = bytearray()
    for data, now, size in pieces:
        source.send(memoryview(data))
        if now:
            carry(source, destination)
            while destination.wait_readable(0):
                got += receive(destination, size)
            carry(destination, source)
    source.end()
    carry(source, destination)
    while data := receive(destination):
        got += data
    assert got == b"".join(data for data, _, _ in pieces)
    source.close()
    assert [message.kind for message in carry(destination, source)][-1] is Kind.SEEN
    carry(source, destination)
    assert source.done
    with pytest.raises(ChannelError, match="the peer closed the connection"):
        destination.send(memoryview(b"x"))


def test_credit_lets_more_through_than_the_window() -> None:
    source, destination = link(), link()
    data = bytes(CHUNK)
    for _ in range(3 * WINDOW // CHUNK):
        source.send(memoryview(data))  # would block without credit
        carry(source, destination)
        assert len(receive(destination)) == CHUNK
        carry(destination, source)


def test_the_end_is_an_end_though_the_connection_is_lost_then() -> None:
    source, destination = link(), link()
    source.send(memoryview(b"all"))
    source.end()
    carry(source, destination)
    destination.lost("gone")
    assert receive(destination) == b"all"
    assert receive(destination) == b"" == receive(destination)
    with pytest.raises(ChannelError, match="peer: gone"):
        destination.send(memoryview(b"x"))


def test_what_came_before_a_loss_is_received() -> None:
    source, destination = link(), link()
    source.send(memoryview(b"half"))
    carry(source, destination)
    destination.lost("gone")
    assert receive(destination) == b"half"
    for _ in range(2):
        with pytest.raises(ChannelError, match="peer: gone"):
            receive(destination)


def test_abort_drops_and_tells() -> None:
    source, destination = link(), link()
    source.send(memoryview(b"dropped"))
    source.abort()
    assert [message.kind for message in carry(source, destination)] == [Kind.RESET]
    with pytest.raises(Interrupted):
        source.send(memoryview(b"x"))
    with pytest.raises(ChannelError, match="connection reset by the peer: the peer aborted") as caught:
        receive(destination)
    assert not isinstance(caught.value, Interrupted)
    source.close()
    assert source.done


def test_close_waits_for_seen() -> None:
    source, destination = link(), link()
    source.send(memoryview(b"tail"))
    source.close()
    assert not source.done
    assert [message.kind for message in carry(source, destination)] == [Kind.DATA, Kind.END, Kind.BYE]
    assert not source.done
    carry(destination, source)
    assert source.done


@pytest.mark.parametrize("lost", [False, True])
def test_an_end_after_the_peer_has_read_everything_and_gone(lost: bool) -> None:
    source, destination = link(), link()
    source.send(memoryview(b"all of it"))
    carry(source, destination)
    assert receive(destination) == b"all of it"
    destination.close()
    carry(destination, source)
    if lost:
        source.lost("gone")
    source.end()
    source.close()
    source.outgoing()
    assert source.done


def test_an_end_after_a_peer_that_did_not_read_everything() -> None:
    source, destination = link(), link()
    source.send(memoryview(b"all of it"))
    carry(source, destination)
    assert receive(destination, 3) == b"all"
    destination.close()
    carry(destination, source)
    with pytest.raises(ChannelError, match="the peer closed the connection"):
        source.end()


# -- a peer that does not --------------------------------------------------------------------------------------------


BREACHES = {
    "a gap": [Message(Kind.DATA, 1, b"x")],
    "twice": [Message(Kind.DATA, 0, b"x"), Message(Kind.DATA, 0, b"x")],
    "too much": [Message(Kind.DATA, n * CHUNK, bytes(CHUNK)) for n in range(WINDOW // CHUNK + 1)],
    "after the end": [Message(Kind.END), Message(Kind.DATA, 0, b"x")],
    "another end": [Message(Kind.END), Message(Kind.END)],
    "an end too far": [Message(Kind.END, 7)],
    "credit for nothing": [Message(Kind.CREDIT, 1)],
    "a farewell that consumed what was not sent": [Message(Kind.BYE, 1)],
    "seen what was not sent": [Message(Kind.SEEN, 0)],
    "hello again": [greeting(Kind.HELLO)],
    "welcome again": [greeting(Kind.WELCOME)],
    "refused": [Message(Kind.REFUSE)],
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_breaks_the_link_on_both_sides(name: str) -> None:
    victim = link()
    for message in BREACHES[name]:
        victim.handle(message)
    assert [message.kind for message in victim.outgoing()][-1] is Kind.RESET
    if not name.endswith("end"):  # an end that has come stays one
        with pytest.raises(ChannelError, match="the peer broke the protocol"):
            receive(victim)
    with pytest.raises(ChannelError, match="the peer broke the protocol"):
        victim.send(memoryview(b"x"))


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(Kind), st.integers(0, 2**64 - 1) | st.integers(0, 20), st.binary(max_size=20)),
        max_size=20,
    )
)
def test_whatever_a_peer_says(script: list[tuple[Kind, int, bytes]]) -> None:
    victim = link()
    for kind, argument, payload in script:
        victim.handle(Message(kind, argument, payload if kind in (Kind.DATA, Kind.RESET) and payload else b""))
        victim.outgoing()
    try:
        assert victim.wait_readable(0) in (True, False)
    except ChannelError as error:
        assert "\n" not in str(error)
    victim.abort()
    victim.close()
    victim.outgoing()
    assert victim.done


@given(st.lists(st.binary(max_size=40), max_size=3))
def test_whatever_arrives_is_a_message_or_an_error(parts: list[bytes]) -> None:
    try:
        message = read_message([memoryview(part) for part in parts])
    except ProtocolError as error:
        assert str(error)
    else:
        assert write_header(message) == parts[0]


def test_golden_bytes() -> None:
    message = Message(Kind.DATA, 0x0102030405060708, b"x")
    assert write_header(message) == bytes.fromhex("04 0102030405060708")
    assert read_message([memoryview(write_header(message)), memoryview(b"x")]) == message
    hello = greeting(Kind.HELLO)
    assert write_header(hello) == bytes.fromhex("01 0000000000800000") and hello.payload == b"migfw-zmq\x01"


WRONG_GREETINGS = {
    "WELCOME instead of HELLO": greeting(Kind.WELCOME),
    "HELLO instead of HELLO": Message(Kind.HELLO, WINDOW, b"nonsense"),
    "version 2 of the protocol, expected 1": Message(Kind.HELLO, WINDOW, b"migfw-zmq\x02"),
    "a window of 5 bytes": Message(Kind.HELLO, 5, b"migfw-zmq\x01"),
}


@pytest.mark.parametrize("text", WRONG_GREETINGS)
def test_wrong_greetings(text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        read_greeting(WRONG_GREETINGS[text], Kind.HELLO)


def test_texts_of_a_peer_are_fit_to_be_shown() -> None:
    victim = link()
    victim.handle(Message(Kind.RESET, 0, b"\x1b[31m\nred\xff"))
    with pytest.raises(ChannelError, match=r"reset by the peer: \?\[31m\?red"):
        receive(victim)
