"""A stream of JSON values, as QMP has it on the wire: they follow each other with or without white space between.

The law: the same bytes give the same values, however they are cut into pieces. Every value gives one item, and
everything that is no value gives a Malformed that says why; reading then goes on behind it. A value ends where its
brackets and braces balance, or close too often, and is judged then. Memory is bounded by the limits, and no depth of
nesting recurses.

Source: as json_lexer.py. Where QEMU differs: after a limit was exceeded it complains about each of the brackets that
still come, this skips the rest of the line; and it reads 1e999 as infinity, which JSON does not have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from corefw.qmp.json_lexer import Kind, Lexer, Token


@dataclass(frozen=True, slots=True)
class Malformed:
    """What came is no JSON; `reason` is QEMU's text for it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What one value may take: bytes without white space, tokens, levels.

    QEMU's are 64 MiB, 2 Mi and 1024. Replies echo an id, and the encoder recurses: 512 levels are safe in any thread.
    """

    size: int = 1 << 20
    tokens: int = 1 << 15
    nesting: int = 512


QEMU_LIMITS: Final = Limits(size=64 << 20, tokens=2 << 20, nesting=1024)
"""What QEMU itself takes, and so what it may send."""


class JsonStream:
    """Feed it with what arrives."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self._limits = limits
        self._lexer = Lexer(limits.size)
        self._restart()

    def feed(self, data: bytes) -> Iterator[object]:
        """The values that end in `data`: None, bool, int, float, str, list, dict; or Malformed.

        Lazy: exhaust it before the next call.
        """
        for token in self._lexer.tokens(data):
            reason = _COMPLAINTS.get(token.kind, _no_complaint)(token) or self._count_token(token)
            if reason is not None:
                if token.kind is not Kind.STRAY:
                    self._lexer.skip_line()
                self._restart()
                yield Malformed(reason)
                continue
            self._build(token)
            if self._braces < 0 or self._brackets < 0 or self._braces == self._brackets == 0:
                built = self._builder.value if self._reason is None else Malformed(self._reason)
                self._restart()
                yield built

    def _restart(self) -> None:
        self._lexer.restart()
        self._builder = _Builder()
        self._reason: str | None = None
        self._count = 0
        self._braces = 0
        self._brackets = 0

    def _count_token(self, token: Token) -> str | None:
        """Count it in; what is too much, if something is."""
        self._count += 1
        self._braces += _BRACES.get(token.text, 0)
        self._brackets += _BRACKETS.get(token.text, 0)
        if self._count > self._limits.tokens:
            return "JSON token count limit exceeded"
        if self._braces + self._brackets > self._limits.nesting:
            return "JSON nesting depth limit exceeded"
        return None

    def _build(self, token: Token) -> None:
        if self._reason is None:
            try:
                self._builder.feed(token)
            except _RejectedError as error:
                self._reason = f"JSON parse error, {error}"


_BRACES: Final = {b"{": 1, b"}": -1}
_BRACKETS: Final = {b"[": 1, b"]": -1}


def _no_complaint(_: Token) -> str | None:
    return None


def _stray(token: Token) -> str:
    return f"JSON parse error, stray '{_shown(token.text)}'"


def _too_long(_: Token) -> str:
    return "JSON token size limit exceeded"


_COMPLAINTS: Final[dict[Kind, Callable[[Token], str | None]]] = {Kind.STRAY: _stray, Kind.TOO_LONG: _too_long}


def _shown(text: bytes) -> str:
    """What a message shows of bytes that made no sense; never much of them."""
    return text[:80].decode(errors="replace").rstrip("\0")


# -- tokens to a value -------------------------------------------------------------------------------------------------


class _RejectedError(Exception):
    """Why the tokens make no value."""


class _Builder:
    """Tokens -> one value, without recursion. `_expect` is the method that takes the next token."""

    def __init__(self) -> None:
        self.value: object = None
        self._open: list[list[object] | dict[str, object]] = []
        self._keys: list[str | None] = []
        self._expect: Callable[[Token], None] = self._value

    def feed(self, token: Token) -> None:
        self._expect(token)

    def _value(self, token: Token) -> None:
        if token.text == b"{":
            self._open.append({})
            self._expect = self._first_key
        elif token.text == b"[":
            self._open.append([])
            self._expect = self._first_item
        else:
            self._put(_scalar(token))

    def _put(self, value: object) -> None:
        if not self._open:
            self.value = value
            return
        container = self._open[-1]
        if isinstance(container, dict):
            key = self._keys.pop()
            if key is None:
                raise _RejectedError("key is not a string in object")
            container[key] = value
            self._expect = self._next_pair
        else:
            container.append(value)
            self._expect = self._next_item

    def _first_item(self, token: Token) -> None:
        if token.text == b"]":
            self._put(self._open.pop())
        else:
            self._value(token)

    def _next_item(self, token: Token) -> None:
        if token.text == b"]":
            self._put(self._open.pop())
        elif token.text == b",":
            self._expect = self._value
        else:
            raise _RejectedError("expected separator in list")

    def _first_key(self, token: Token) -> None:
        if token.text == b"}":
            self._put(self._open.pop())
        else:
            self._key(token)

    def _key(self, token: Token) -> None:
        if token.text in (b"{", b"["):
            self._keys.append(None)  # no key, but what is inside is judged first
            self._value(token)
            return
        key = _scalar(token)
        if not isinstance(key, str):
            raise _RejectedError("key is not a string in object")
        if key in self._open[-1]:
            raise _RejectedError("duplicate key")
        self._keys.append(key)
        self._expect = self._colon

    def _colon(self, token: Token) -> None:
        if token.text != b":":
            raise _RejectedError("missing : in object pair")
        self._expect = self._value

    def _next_pair(self, token: Token) -> None:
        if token.text == b"}":
            self._put(self._open.pop())
        elif token.text == b",":
            self._expect = self._key
        else:
            raise _RejectedError("expected separator in dict")


def _scalar(token: Token) -> object:
    reader = _SCALARS.get(token.kind)
    if reader is None:
        raise _RejectedError("expecting value")
    return reader(token.text)


_KEYWORDS: Final = {b"null": None, b"true": True, b"false": False}


def _keyword(text: bytes) -> object:
    if text not in _KEYWORDS:
        raise _RejectedError(f"invalid keyword '{_shown(text)}'")
    return _KEYWORDS[text]


_INTEGERS: Final = range(-(2**63), 2**64)
"""Whole numbers beyond these become floating-point ones, as in QEMU."""

_INTEGER_DIGITS: Final = 20


def _number(text: bytes) -> object:
    whole = text.lstrip(b"-").isdigit()
    if whole and len(text) <= _INTEGER_DIGITS + 1 and int(text) in _INTEGERS:
        return int(text)
    value = float(text)
    if not math.isfinite(value):
        raise _RejectedError(f"number '{_shown(text)}' is out of range")
    return value


_HEX: Final = "[0-9a-fA-F]"
_NO_CHARACTERS: Final = "\ud800-\udfff\ufdd0-\ufdef" + "".join(
    chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)
)
"""Code points that Unicode keeps out of text; QEMU refuses them. A byte that is no UTF-8 becomes a surrogate."""

_NO_CHARACTER: Final = re.compile(f"[{_NO_CHARACTERS}]")

_SPECIAL: Final = re.compile(
    rf"\\u(?P<high>[dD][89abAB]{_HEX}{{2}})\\u(?P<low>[dD][c-fC-F]{_HEX}{{2}})"
    rf"|\\u(?P<code>{_HEX}{{4}})"
    r"|\\(?P<short>.)"
    rf"|(?P<bad>[{_NO_CHARACTERS}])",
    re.DOTALL,
)
_SHORT: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "'": "'", "\\": "\\", "/": "/"}


def _string(quoted: bytes) -> object:
    # QEMU's "modified UTF-8" writes NUL in two bytes.
    text = quoted.replace(b"\xc0\x80", b"\0").decode(errors="surrogateescape")
    return text[1:-1] if text.isascii() and "\\" not in text else _SPECIAL.sub(_character, text)[1:-1]


def _character(found: re.Match[str]) -> str:
    if found["bad"] is not None:
        raise _RejectedError("invalid UTF-8 sequence in string")
    if found["short"] is not None:
        if found["short"] in _SHORT:
            return _SHORT[found["short"]]
        if found["short"] != "u":
            raise _RejectedError("invalid escape sequence in string")
    else:
        character = _from_hex(found)
        if not _NO_CHARACTER.match(character):
            return character
    shown = found.string[found.start() :].encode(errors="surrogateescape")[:6]
    raise _RejectedError(f"{_shown(shown)} is not a valid Unicode character")


def _from_hex(found: re.Match[str]) -> str:
    if found["high"] is None:
        return chr(int(found["code"], 16))
    high, low = int(found["high"], 16) & 0x3FF, int(found["low"], 16) & 0x3FF
    return chr(0x10000 + (high << 10) + low)


_SCALARS: Final[dict[Kind, Callable[[bytes], object]]] = {
    Kind.STRING: _string,
    Kind.NUMBER: _number,
    Kind.KEYWORD: _keyword,
}
