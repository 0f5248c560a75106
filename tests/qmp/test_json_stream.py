"""The law of the stream: the same bytes give the same items, however they are cut; nothing crashes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.qmp.json_stream import JsonStream, Limits, Malformed

USUAL = Limits()
SMALL = Limits(size=24, tokens=12, nesting=4)


def items(*pieces: bytes, limits: Limits = USUAL) -> list[object]:
    stream = JsonStream(limits)
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

# Bytes that look like JSON more often than chance would have it.
_PIECES = [
    *(bytes([byte]) for byte in b"{}[]:,\"'\\ \n\t-01.e+xA\x00\x1f\x7f\xc3\xfe\xff"),
    *(b"null", b"true", b"\\u12", b"\\ud800", b"\xc3\xa9", b'"a"', b"{}", b"[1]", b'{"a": 1}'),
]
jsonish = st.lists(st.sampled_from(_PIECES), max_size=40).map(b"".join)


@settings(max_examples=60)
@given(st.lists(values, max_size=3), st.booleans(), st.lists(st.integers(0, 10**6), max_size=8))
def test_reads_what_json_writes_however_it_is_cut(sent: list[object], ascii_only: bool, places: list[int]) -> None:
    data = b"\n".join(json.dumps(value, ensure_ascii=ascii_only).encode() for value in sent) + b" "
    assert items(*cut(data, places), limits=Limits(1 << 24, 1 << 20, 1024)) == sent


@given(jsonish | st.binary(max_size=60), st.lists(st.integers(0, 10**6), max_size=8), st.sampled_from([USUAL, SMALL]))
def test_cuts_make_no_difference_to_anything(data: bytes, places: list[int], limits: Limits) -> None:
    whole = items(data, limits=limits)
    assert items(*cut(data, places), limits=limits) == whole
    assert items(*(bytes([byte]) for byte in data), limits=limits) == whole


@given(jsonish)
def test_every_byte_string_is_recovered_from(data: bytes) -> None:
    assert items(data, b"\n}]}\xff\n\n", b'{"execute": "stop"}')[-1] == {"execute": "stop"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 5, "JSON nesting depth limit exceeded"),
        (b"[1,1,1,1,1,1,1,1]", "JSON token count limit exceeded"),
        (b'"' + b"a" * 40 + b'"', "JSON token size limit exceeded"),
        (b'"' + b"a" * 40, "JSON token size limit exceeded"),
        (b"1" * 40, "JSON token size limit exceeded"),
        (b"a" * 40, "JSON token size limit exceeded"),
    ],
)
def test_a_limit_ends_one_line_and_no_more(data: bytes, reason: str) -> None:
    assert items(data + b"]]]} 1 2 3\n[4]", limits=SMALL) == [Malformed(reason), [4]]


def test_white_space_costs_nothing() -> None:
    assert items(b"[" + b" \n" * 5000 + b"1]", limits=SMALL) == [[1]]


def test_a_deep_value_needs_no_stack() -> None:
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
        (rb'"\u00e9\ud83d\ude00\n\/\b\f\r\t\"\\"', 'é\U0001f600\n/\b\f\r\t"\\'),
        (b'"\xc0\x80"', "\0"),
        (b"-0 ", 0),
        (b"1E+2 ", 100.0),
        (b"18446744073709551615 ", 2**64 - 1),
        (b"18446744073709551616 ", float(2**64)),
        (b"-9223372036854775809 ", -float(2**63)),
    ],
)
def test_values(text: bytes, value: object) -> None:
    (item,) = items(text)
    assert item == value
    assert type(item) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{,}", "expecting value"),
        (b"}", "expecting value"),
        (b"{1:2}", "key is not a string in object"),
        (b'{"a" 1}', "missing : in object pair"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b'{"a":1 "b":2}', "expected separator in dict"),
        (b"[1 2]", "expected separator in list"),
        (b"nulll ", "invalid keyword 'nulll'"),
        (b'"\\x"', "invalid escape sequence in string"),
        (b'"\\ud83dx"', "\\ud83d is not a valid Unicode character"),
        (b'"\xc3"', "invalid UTF-8 sequence in string"),
        (b"@", "stray '@'"),
        (b'"a\n', "stray '\"a\n'"),
        (b"1e999 ", "number '1e999' is out of range"),
    ],
)
def test_what_is_wrong_is_said(text: bytes, reason: str) -> None:
    assert items(text) == [Malformed(f"JSON parse error, {reason}")]
