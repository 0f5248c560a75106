"""corefw.wire.verdict: what is overheard on a return path, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.wire.constants import ReturnMessage
from corefw.wire.returnpath import PageRequest, encode_return_message, number_body, page_request_message
from corefw.wire.verdict import Overhearing, Verdict

PONG = encode_return_message(ReturnMessage.PONG, number_body(0))
SHUT = encode_return_message(ReturnMessage.SHUT, number_body(0))
SHUT_1 = encode_return_message(ReturnMessage.SHUT, number_body(1))
PAGES = page_request_message(PageRequest(0, 4096, "pc.ram")) + page_request_message(PageRequest(4096, 4096))
BITMAP = encode_return_message(ReturnMessage.RECV_BITMAP, b"\6pc.ram")


def verdict(*pieces: bytes) -> Verdict:
    overhearing = Overhearing()
    for piece in pieces:
        overhearing.hear(piece)
    return overhearing.verdict


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", Verdict.UNKNOWN),
        (PONG, Verdict.OPEN),
        (PAGES, Verdict.OPEN),
        (SHUT, Verdict.ACCEPTED),
        (PONG + PAGES + SHUT, Verdict.ACCEPTED),
        (PONG + SHUT_1, Verdict.REFUSED),
        (SHUT + PONG, Verdict.OPEN),
        (SHUT[:-1], Verdict.UNKNOWN),
        (PONG + SHUT[:-1], Verdict.OPEN),
        (PONG + b"\0\xff\0\0" + SHUT, Verdict.UNKNOWN),
        (PONG + b"\0\1\0\5\0\0\0\0\0" + SHUT, Verdict.UNKNOWN),
        (PONG + b"\0\3\xff\xff" + SHUT, Verdict.UNKNOWN),
        (BITMAP + SHUT, Verdict.UNKNOWN),
        (b"HTTP/1.1 200 OK\r\n" + SHUT, Verdict.UNKNOWN),
    ],
)
def test_the_last_word_counts(said: bytes, expected: Verdict) -> None:
    assert verdict(said) == expected
    assert verdict(*(said[at : at + 1] for at in range(len(said)))) == expected


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_anything_may_be_said_in_any_pieces(pieces: list[bytes]) -> None:
    assert verdict(*pieces) == verdict(b"".join(pieces))
