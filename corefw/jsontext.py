"""JSON from a peer or a file that is not trusted -> Python values, or a JsonError.

`json.loads` alone accepts more than JSON (NaN, UTF-16) and raises RecursionError for deep nesting. Callers limit the
length of the text before they read it; `parse_json` checks everything else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Final

_INTEGERS: Final = range(-(2**63), 2**64)
_INTEGER_DIGITS: Final = 20


class JsonError(ValueError):
    """The text is not JSON. `reason` says why, as QEMU's parser would; the message adds where."""

    def __init__(self, reason: str, where: str = "") -> None:
        self.reason: Final = reason
        super().__init__(reason + where)


def parse_json(text: bytes | bytearray | str, *, unique_keys: bool = False) -> object:
    """None, bool, int, float, str, list or dict. Raises JsonError.

    A whole number that does not fit 64 bits becomes a float, as in QEMU. If a key occurs twice in an object, the last
    value counts (QEMU's descriptions of streams have such objects), or with `unique_keys` the text is refused. As in
    Python, a string may have escaped single surrogates, which stand for bytes of a name that is not UTF-8.
    """
    try:
        if not isinstance(text, str):
            text = text.decode()
        value: object = json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
            object_pairs_hook=_unique if unique_keys else None,
        )
    except json.JSONDecodeError as error:
        raise JsonError(_reason(error), f" (line {error.lineno}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise JsonError("invalid UTF-8 sequence in string", f" (byte {error.start})") from None
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    return value


_REASONS: Final[Mapping[str, str]] = {
    "Expecting value": "expecting value",
    "Expecting property name enclosed in double quotes": "key is not a string in object",
    "Expecting ':' delimiter": "missing : in object pair",
    "Invalid \\escape": "invalid escape sequence in string",
    "Invalid \\uXXXX escape": "invalid escape sequence in string",
}
"""Python's messages -> QEMU's."""

_STRUCTURE: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _reason(error: json.JSONDecodeError) -> str:
    if error.msg != "Expecting ',' delimiter":
        return _REASONS.get(error.msg, error.msg[:1].lower() + error.msg[1:])
    opened: list[str] = []
    for token in _STRUCTURE.findall(error.doc, 0, error.pos):
        if token in ("{", "["):
            opened.append(token)
        elif token in ("}", "]"):
            opened.pop()
    return f"expected separator in {'dict' if opened[-1:] == ['{'] else 'list'}"


def _integer(digits: str) -> float:
    if len(digits) > _INTEGER_DIGITS + 1:  # never let int() see thousands of digits
        return _float(digits)
    value = int(digits)
    return value if value in _INTEGERS else _float(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"number '{digits[:80]}' is out of range")
    return value


def _constant(name: str) -> object:
    raise JsonError(f"invalid keyword '{name}'")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise JsonError("duplicate key")
    return found
