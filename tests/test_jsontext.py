"""parse_json accepts JSON and nothing else, whatever the bytes are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.jsontext import JsonError, parse_json
from tests.qmp.test_json_stream import values


@given(values, st.booleans())
def test_reads_what_json_writes(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == parse_json(text.encode()) == value


@given(st.binary(max_size=80) | st.text(max_size=80))
def test_everything_else_is_a_json_error(text: bytes | str) -> None:
    try:
        parse_json(text)
    except JsonError as error:
        assert "\n" not in error.reason


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"[", b"{", b'"', b"nul", b"NaN", b"-Infinity", b"1e999", b"[1]x", b"\xff", b"01", b"1" * 5000),
        *(b'"\xed\xa0\x80"', b"[" * 100_000, b'{"a":' * 100_000),
        *("[1]".encode("utf-16"), b"\xef\xbb\xbf[1]"),
    ],
)
def test_what_is_refused(text: bytes) -> None:
    with pytest.raises(JsonError):
        parse_json(text)


def test_names_that_are_not_utf8_survive() -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    assert parse_json(json.dumps(name)) == name


def test_a_key_that_occurs_twice() -> None:
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(JsonError, match=r"^duplicate key$"):
        parse_json('[{"a": 1, "a": 2}]', unique_keys=True)


def test_the_message_says_where() -> None:
    with pytest.raises(JsonError, match=r"^expecting value \(line 2, column 6\)$") as caught:
        parse_json('{\n"a": }')
    assert caught.value.reason == "expecting value"
