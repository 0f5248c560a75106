"""The outcome that a relay reads on a return path, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.wire.constants import ReturnMessage
from corefw.wire.outcome import Outcome, OutcomeMonitor
from corefw.wire.returnpath import PageRequest, encode_return_message, number_body, page_request_message

PONG = encode_return_message(ReturnMessage.PONG, number_body(0))
SHUT = encode_return_message(ReturnMessage.SHUT, number_body(0))
SHUT_1 = encode_return_message(ReturnMessage.SHUT, number_body(1))
PAGES = page_request_message(PageRequest(0, 4096, "pc.ram")) + page_request_message(PageRequest(4096, 4096))
BITMAP = encode_return_message(ReturnMessage.RECV_BITMAP, b"\6pc.ram")
OF_PLUGIN = encode_return_message(0x7001, b"12345")


def outcome(*pieces: bytes) -> Outcome:
    monitor = OutcomeMonitor()
    for piece in pieces:
        monitor.feed(piece)
    return monitor.outcome


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", Outcome.UNKNOWN),
        (PONG, Outcome.OPEN),
        (PAGES, Outcome.OPEN),
        (SHUT, Outcome.ACCEPTED),
        (PONG + PAGES + SHUT, Outcome.ACCEPTED),
        (PONG + SHUT_1, Outcome.REFUSED),
        (SHUT + PONG, Outcome.OPEN),
        (SHUT[:-1], Outcome.UNKNOWN),
        (PONG + SHUT[:-1], Outcome.OPEN),
        (PONG + b"\0\xff\0\0" + SHUT, Outcome.UNKNOWN),
        (PONG + b"\0\1\0\5\0\0\0\0\0" + SHUT, Outcome.UNKNOWN),
        (PONG + b"\0\3\xff\xff" + SHUT, Outcome.UNKNOWN),
        (OF_PLUGIN + SHUT, Outcome.ACCEPTED),
        (b"\x70\1\2\1" + bytes(513) + SHUT, Outcome.UNKNOWN),
        (BITMAP + SHUT, Outcome.UNKNOWN),
        (b"HTTP/1.1 200 OK\r\n" + SHUT, Outcome.UNKNOWN),
    ],
)
def test_the_last_word_counts(said: bytes, expected: Outcome) -> None:
    assert outcome(said) == expected
    assert outcome(*(said[at : at + 1] for at in range(len(said)))) == expected


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_anything_may_be_said_in_any_pieces(pieces: list[bytes]) -> None:
    assert outcome(*pieces) == outcome(b"".join(pieces))
