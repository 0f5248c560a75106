"""The same bytes give the same messages, in whatever portions they arrive; the stream recovers from errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.qmp.json_stream import REQUEST_LIMIT, JsonStream, Malformed

SMALL = 24


def items(*pieces: bytes, limit: int = REQUEST_LIMIT) -> list[object]:
    stream = JsonStream(limit)
    return [item for piece in pieces for item in stream.feed(piece)]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


characters = st.characters(exclude_categories=["Cs"]).filter(lambda c: ord(c) & 0xFFFE != 0xFFFE)
characters = characters.filter(lambda c: not 0xFDD0 <= ord(c) <= 0xFDEF)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(characters)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(characters), inner, max_size=4),
    max_leaves=12,
)
messages = st.dictionaries(st.text(characters), values, max_size=4) | st.lists(values, max_size=4)

# Bytes that look like JSON more often than chance would have it.
_PIECES = [
    *(bytes([byte]) for byte in b"{}[]:,\"'\\ \n\t-01.e+xA\x00\x1f\x7f\xc3\xfe\xff"),
    *(b"null", b"true", b"\\u12", b"\\ud800", b"\xc3\xa9", b'"a"', b"{}", b"[1]", b'{"a": 1}'),
]
jsonish = st.lists(st.sampled_from(_PIECES), max_size=40).map(b"".join)


@settings(max_examples=60)
@given(st.lists(messages, max_size=3), st.booleans(), st.lists(st.integers(0, 10**6), max_size=8))
def test_reads_what_json_writes_however_it_is_cut(sent: list[object], ascii_only: bool, places: list[int]) -> None:
    data = b"".join(json.dumps(value, ensure_ascii=ascii_only).encode() for value in sent)
    assert items(*cut(data, places)) == sent


@given(jsonish | st.binary(max_size=60), st.lists(st.integers(0, 10**6), max_size=8), st.sampled_from([1 << 20, SMALL]))
def test_cuts_make_no_difference_to_anything(data: bytes, places: list[int], limit: int) -> None:
    whole = items(data, limit=limit)
    assert items(*cut(data, places), limit=limit) == whole
    assert items(*(bytes([byte]) for byte in data), limit=limit) == whole


@given(jsonish)
def test_every_byte_string_is_recovered_from(data: bytes) -> None:
    assert items(data, b'\xff{"execute": "stop"}')[-1] == {"execute": "stop"}


@given(jsonish)
def test_reading_is_total(data: bytes) -> None:
    assert all(isinstance(item, dict | list | Malformed) for item in items(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'["' + b"a" * 40 + b'"', "JSON token size limit exceeded"),
        (b'["' + b"a" * 40, "JSON token size limit exceeded"),
        (b"[" + b"1" * 40, "JSON token size limit exceeded"),
        (b"[" + b" " * 40, "JSON token size limit exceeded"),
    ],
)
def test_a_limit_ends_one_line_and_no_more(data: bytes, reason: str) -> None:
    assert items(data + b"]]]} 1 2 3\n[4]", limit=SMALL) == [Malformed(reason), [4]]


def test_too_many_levels_end_one_line() -> None:
    assert items(b"[" * 513 + b"]]]\n[4]") == [Malformed("JSON nesting depth limit exceeded"), [4]]


def test_white_space_between_messages_costs_nothing() -> None:
    assert items(b" \n\t\r" * 5000 + b"[1]", limit=SMALL) == [[1]]


def test_a_deep_value_is_read() -> None:
    depth = 500
    (value,) = items(b"[" * depth + b"]" * depth)
    for _ in range(depth - 1):
        assert isinstance(value, list)
        (value,) = value
    assert value == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{'a': '\"'}", {"a": '"'}),
        (rb"""{'it\'s': "it's", "'": '\\"\\'}""", {"it's": "it's", "'": '\\"\\'}),
        (rb'["\u00e9\ud83d\ude00\n\/\b\f\r\t\"\\"]', ['é\U0001f600\n/\b\f\r\t"\\']),
        (b'["}{"]', ["}{"]),
        (b"[\r\n\t-0 ]", [0]),
        (b"[1E+2]", [100.0]),
        (b"[18446744073709551615]", [2**64 - 1]),
        (b"[18446744073709551616]", [float(2**64)]),
        (b"[-9223372036854775809]", [-float(2**63)]),
    ],
)
def test_values(text: bytes, value: object) -> None:
    (item,) = items(text)
    assert repr(item) == repr(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"}", "expecting value"),
        (b"[,]", "expecting value"),
        (b"{1:2}", "key is not a string in object"),
        (b'{"a" 1}', "missing : in object pair"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b'{"a":[1],"b":"]" "c":2}', "expected separator in dict"),
        (b'[{"a": "["}, [2] 3]', "expected separator in list"),
        (b"[nulll]", "expected separator in list"),
        (b"[NaN]", "invalid keyword 'NaN'"),
        (b'["\\x"]', "invalid escape sequence in string"),
        (b'["\\ud83dx"]', "an escape in a string is not a valid Unicode character"),
        (b'["\xc3"]', "invalid UTF-8 sequence in string"),
        (b"@", "stray '@'"),
        (b'["a\n', "stray '\n'"),
        (b"[1e999]", "number '1e999' is out of range"),
    ],
)
def test_what_is_wrong_is_said(text: bytes, reason: str) -> None:
    assert items(text) == [Malformed(f"JSON parse error, {reason}")]


def test_after_a_bad_line_the_next_is_read() -> None:
    assert items(b'hello {"execute": "stop"}\n{"execute": "cont"}') == [
        Malformed("JSON parse error, stray 'h'"),
        {"execute": "cont"},
    ]
