"""Bytes in pieces of any size -> JSON tokens.

The law: where the pieces end makes no difference, and the time is linear in what came. What belongs to no token is
STRAY; reading goes on behind it at the next bracket, brace, colon, comma, line end or byte that JSON never has.

Source: RFC 8259, and what QEMU 7.2's monitor takes and refuses (tests/qmp/test_against_qemu.py compares them): strings
may be in single quotes, and a number that breaks off takes the byte behind it along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Final, NamedTuple


class Kind(Enum):
    """What a token is. TOO_LONG has no text: the tokens since the last `restart` exceed the limit."""

    STRUCTURE = auto()
    STRING = auto()
    NUMBER = auto()
    KEYWORD = auto()
    STRAY = auto()
    TOO_LONG = auto()


class Token(NamedTuple):
    """`text` as it came: a string has its quotes and escapes."""

    kind: Kind
    text: bytes


class _Number(Enum):
    """Where in a number the lexer is."""

    MINUS = auto()
    ZERO = auto()
    INTEGER = auto()
    POINT = auto()
    FRACTION = auto()
    E = auto()
    E_SIGN = auto()
    EXPONENT = auto()


def _row(**columns: _Number) -> Mapping[int, _Number]:
    row: dict[int, _Number] = {}
    for column, state in columns.items():
        row.update(dict.fromkeys(_COLUMNS[column], state))
    return row


_COLUMNS: Final = {
    "minus": b"-",
    "sign": b"+-",
    "zero": b"0",
    "one_to_nine": b"123456789",
    "digit": b"0123456789",
    "point": b".",
    "e": b"eE",
}
_N = _Number
_NUMBERS: Final[Mapping[_Number, Mapping[int, _Number]]] = {
    _N.MINUS: _row(zero=_N.ZERO, one_to_nine=_N.INTEGER),
    _N.ZERO: _row(point=_N.POINT),
    _N.INTEGER: _row(digit=_N.INTEGER, point=_N.POINT, e=_N.E),
    _N.POINT: _row(digit=_N.FRACTION),
    _N.FRACTION: _row(digit=_N.FRACTION, e=_N.E),
    _N.E: _row(sign=_N.E_SIGN, digit=_N.EXPONENT),
    _N.E_SIGN: _row(digit=_N.EXPONENT),
    _N.EXPONENT: _row(digit=_N.EXPONENT),
}
_NUMBER_BEGINS: Final = _row(minus=_N.MINUS, zero=_N.ZERO, one_to_nine=_N.INTEGER)
_NUMBER_MAY_END: Final = frozenset({_N.ZERO, _N.INTEGER, _N.FRACTION, _N.EXPONENT})

_STRUCTURE: Final = frozenset(b"{}[]:,")
_LOWER_CASE: Final = frozenset(range(ord("a"), ord("z") + 1))
_DIGITS: Final = frozenset(b"0123456789")
_BACKSLASH: Final = 0x5C
_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_KEYWORD: Final = re.compile(rb"[a-z]*")
_PLAIN: Final = {
    ord('"'): re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*'),
    ord("'"): re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*"),
}
"""By the quote that opened it: the bytes of a string that stand for themselves."""

_RESET: Final = re.compile(rb"[^{}\[\]:,\x00-\x08\x0a-\x1f\xfe\xff]*")
_REST_OF_LINE: Final = re.compile(rb"[^\r\n\xfe\xff]*")

_Step = tuple[int, Token | None]
"""How far it got, and the token that ended there."""


class Lexer:
    """Feed it with `tokens`. `restart` and `skip_line` may be called between two tokens."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._part = bytearray()
        self._quote = 0
        self._escaped = False
        self._number: _Number | None = None
        self._skip: re.Pattern[bytes] | None = None

    def restart(self) -> None:
        """A new value begins: count its bytes from zero."""
        self._size = 0

    def skip_line(self) -> None:
        """Ignore everything up to the next line end."""
        self._skip = _REST_OF_LINE

    def tokens(self, data: bytes) -> Iterator[Token]:
        """The tokens that end in `data`. Exhaust it before the next call."""
        at = 0
        while at < len(data):
            if self._skip is not None:
                at = _end(self._skip, data, at, len(data))
                if at < len(data):
                    self._skip = None
                continue
            at, token = self._step(data, at)
            if self._size > self._limit:
                self._finish(Kind.TOO_LONG)
                yield Token(Kind.TOO_LONG, b"")
            elif token is not None:
                yield token

    def _step(self, data: bytes, at: int) -> _Step:
        if self._quote:
            return self._in_string(data, at)
        if self._number is not None:
            return self._in_number(self._number, data, at)
        if self._part:
            return self._in_keyword(data, at)
        return self._between(data, at)

    def _between(self, data: bytes, at: int) -> _Step:
        at = _end(_SPACE, data, at, len(data))
        if at == len(data):
            return at, None
        byte = data[at]
        self._take(data[at : at + 1])
        if byte in _STRUCTURE:
            return at + 1, self._finish(Kind.STRUCTURE)
        if byte in _PLAIN:
            self._quote = byte
        elif byte in _NUMBER_BEGINS:
            self._number = _NUMBER_BEGINS[byte]
        elif byte not in _LOWER_CASE:
            return at + 1, self._finish(Kind.STRAY)
        return at + 1, None

    def _in_string(self, data: bytes, at: int) -> _Step:
        if not self._escaped:
            at = self._run(_PLAIN[self._quote], data, at)
            if at == len(data) or self._size > self._limit:
                return at, None
        byte = data[at]
        self._take(data[at : at + 1])
        if byte < 0x20 or byte >= 0xFE:
            return at + 1, self._finish(Kind.STRAY)
        if not self._escaped and byte == self._quote:
            return at + 1, self._finish(Kind.STRING)
        self._escaped = not self._escaped and byte == _BACKSLASH
        return at + 1, None

    def _in_number(self, state: _Number, data: bytes, at: int) -> _Step:
        following = _NUMBERS[state].get(data[at])
        if following is None and state in _NUMBER_MAY_END and not (state is _N.ZERO and data[at] in _DIGITS):
            return at, self._finish(Kind.NUMBER)
        self._take(data[at : at + 1])
        if following is None:
            return at + 1, self._finish(Kind.STRAY)
        self._number = following
        return at + 1, None

    def _in_keyword(self, data: bytes, at: int) -> _Step:
        at = self._run(_KEYWORD, data, at)
        if at == len(data) or self._size > self._limit:
            return at, None
        return at, self._finish(Kind.KEYWORD)

    def _run(self, pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
        """Take what matches, up to the byte that exceeds the limit: so the cuts between pieces make no difference."""
        end = _end(pattern, data, at, at + self._limit + 1 - self._size)
        self._take(data[at:end])
        return end

    def _take(self, data: bytes) -> None:
        self._part += data
        self._size += len(data)

    def _finish(self, kind: Kind) -> Token:
        token = Token(kind, bytes(self._part))
        self._part.clear()
        self._quote = 0
        self._escaped = False
        self._number = None
        if kind is Kind.STRAY:
            self._skip = _RESET
        return token


def _end(pattern: re.Pattern[bytes], data: bytes, at: int, limit: int) -> int:
    found = pattern.match(data, at, limit)
    return found.end() if found else at
