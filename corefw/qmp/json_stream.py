"""Bytes from a QMP peer -> JSON messages.

A message is an object or array. It ends where its brackets and braces balance, or where one closes that was not open;
messages may follow each other with or without white space. The scanner here looks only for brackets, quotes and bytes
that JSON never contains, and `parse_json` does the rest. The same bytes give the same items, however they are cut into
pieces.

After an error the stream goes on behind the line that it was in. The byte 0xFF discards what came before it, as the
QMP specification (QEMU 7.2, docs/interop/qmp-spec) says.

Two things that QEMU's parser accepts are kept, because people and scripts send them: strings in single quotes, and
messages without a line break between them. What QEMU also accepts and no known client sends is refused: values outside
of an object or array, `\\'` in a string in double quotes, and NUL as the two bytes 0xC0 0x80.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from corefw.jsontext import JsonError, parse_json

REQUEST_LIMIT: Final = 1 << 20
"""Bytes in a message from a client. QEMU takes 64 MiB."""

REPLY_LIMIT: Final = 16 << 20
"""Bytes in a message from a server; QEMU's longest is its schema, with less than 1 MiB."""

NESTING: Final = 512
"""Levels of nesting. QEMU takes 1024. A reply echoes the request's id, and Python's encoder recurses: this is safe in
every thread."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """What came is not JSON. `reason` is the text for the reply."""

    reason: str


_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_LINE_END: Final = re.compile(rb"[\n\xfe\xff]")
_NEVER: Final = rb"\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff"
"""Bytes that no JSON has; strings have no tab, CR or LF either."""

_STRUCTURE: Final = re.compile(rb"[\[\]{}\"'" + _NEVER + rb"]")
_STRING: Final[Mapping[int, re.Pattern[bytes]]] = {
    quote: re.compile(rb"[\\%c\t\r\n%b]" % (quote, _NEVER)) for quote in b"\"'"
}
_BRACES: Final = {ord("{"): 1, ord("}"): -1}
_BRACKETS: Final = {ord("["): 1, ord("]"): -1}
_BACKSLASH: Final = ord("\\")


class JsonStream:
    """Feed it what arrives. `limit` is the length of a message in bytes, from its first bracket to its last."""

    def __init__(self, limit: int = REQUEST_LIMIT) -> None:
        self._limit = limit
        self._skipping = False
        self._restart()

    def _restart(self) -> None:
        self._text = bytearray()
        self._quote = 0
        self._escaped = False
        self._braces = 0
        self._brackets = 0

    def feed(self, data: bytes) -> Iterator[object]:
        """The messages that end in `data`, each a dict or list, or Malformed. Exhaust it before the next call."""
        at = 0
        while True:
            at = self._between(data, at)
            if at == len(data):
                return
            if not self._text and data[at] not in b"[]{}":
                yield self._refuse(data[at])
                at += 1
                continue
            at = self._scan(data, at)
            item = self._item()
            if item is not None:
                yield item

    def _between(self, data: bytes, at: int) -> int:
        """Where the next message or the rest of this one begins."""
        if self._skipping:
            found = _LINE_END.search(data, at)
            self._skipping = found is None
            at = found.start() if found else len(data)
        if not self._text:
            space = _SPACE.match(data, at)
            assert space, "it matches nothing as well"
            at = space.end()
        return at

    def _scan(self, data: bytes, at: int) -> int:
        """Take everything up to the next byte that matters, and that byte; no more than the limit and one byte, so that
        it makes no difference where `data` was cut. Returns where it stopped."""
        if self._escaped:
            found, end = None, at + 1
            self._escaped = False
        else:
            pattern = _STRING[self._quote] if self._quote else _STRUCTURE
            found = pattern.search(data, at, at + self._limit + 1 - len(self._text))
            end = found.end() if found else min(len(data), at + self._limit + 1 - len(self._text))
        self._text += data[at:end]
        if found:
            self._count(data[end - 1])
        return end

    def _count(self, byte: int) -> None:
        if byte == self._quote:
            self._quote = 0
        elif self._quote:
            self._escaped = byte == _BACKSLASH
        elif byte in _STRING:
            self._quote = byte
        else:
            self._braces += _BRACES.get(byte, 0)
            self._brackets += _BRACKETS.get(byte, 0)

    def _item(self) -> object:
        """The message that ended with the last byte, or what is wrong with it; None: it goes on."""
        last = self._text[-1]
        if self._is_stray(last):
            return self._refuse(last)
        if len(self._text) > self._limit:
            return self._give_up("JSON token size limit exceeded")
        if self._braces + self._brackets > NESTING:
            return self._give_up("JSON nesting depth limit exceeded")
        if self._quote or not (self._braces < 0 or self._brackets < 0 or self._braces == self._brackets == 0):
            return None
        text = bytes(self._text)
        self._restart()
        return _parse(text)

    def _is_stray(self, byte: int) -> bool:
        return byte >= 0xFE or (byte < 0x20 and (bool(self._quote) or byte not in b"\t\r\n"))

    def _refuse(self, byte: int) -> Malformed:
        """`byte` cannot be where it is."""
        return self._give_up(
            f"JSON parse error, stray '{bytes([byte]).decode(errors='replace')}'", skip=byte not in b"\n\xfe\xff"
        )

    def _give_up(self, reason: str, *, skip: bool = True) -> Malformed:
        self._skipping = skip
        self._restart()
        return Malformed(reason)


def _parse(text: bytes) -> object:
    try:
        value = parse_json(_in_double_quotes(text) if b"'" in text else text, unique_keys=True)
    except JsonError as error:
        return Malformed(f"JSON parse error, {error.reason}")
    return Malformed(_SURROGATE) if _ESCAPED_SURROGATE.search(text) and not _is_unicode(value) else value


_ESCAPED_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE: Final = "JSON parse error, an escape in a string is not a valid Unicode character"


def _is_unicode(value: object) -> bool:
    """Whether no string has a surrogate that is not one of a pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_QUOTED: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|\'(?P<single>(?:[^\'\\]|\\.)*)\'', re.DOTALL)
_SPECIAL: Final = re.compile(rb'\\.|"', re.DOTALL)
_REWRITTEN: Final = {b"\\'": b"'", b'"': b'\\"'}


def _in_double_quotes(text: bytes) -> bytes:
    """The same with strings in single quotes rewritten."""

    def string(found: re.Match[bytes]) -> bytes:
        single = found["single"]
        if single is None:
            return found[0]
        return b'"%b"' % _SPECIAL.sub(lambda special: _REWRITTEN.get(special[0], special[0]), single)

    return _QUOTED.sub(string, text)
