"""The text form of guest.value and guest.rng: JSON, in ASCII, with tagged objects for what JSON does not have.

    bytes                {"$bytes": "aGVsbG8="}          base64
    tuple                {"$tuple": [1, 2]}
    int beyond 63 bits   {"$int": "-0x1f..."}
    inf, -inf, nan       {"$float": "inf"}
    a key "$x"           "$$x"

Only these exact types and None, bool, int, float, str, list and dict are allowed, so a value arrives as it was sent,
and decoding runs no foreign code.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from corefw.jsontext import JsonError, parse_json
from corefw.quantities import format_size

MAX_DEPTH: Final = 100
COUNTED: Final = 8
"""Multiple of the limit at which encode() stops counting the size of a value that is too large."""

_BIG: Final = 1 << 63
_SPECIAL: Final = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


def encode(value: object, limit: int) -> str:
    """Encode a value. Raises TypeError for unsupported types, ValueError if it is too large or too deep; the message
    follows the value's name, as in "['x'][3] is of type set: ..."."""
    text = json.dumps(_Encoder(limit).convert(value, "", 0), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    if len(text) > limit:
        raise too_large(format_size(len(text)), limit)
    return text


def too_large(size: str, limit: int) -> ValueError:
    return ValueError(f" has {size}, its limit is {format_size(limit)} (keep less in it, or give it a larger limit=)")


class _Encoder:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._least = 0  # size of the text in bytes

    def convert(self, value: Any, where: str, depth: int) -> Any:
        kind = type(value)
        self._count(1)
        if depth > MAX_DEPTH:
            raise ValueError(f" is nested deeper than {MAX_DEPTH} levels, or contains itself")
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if -_BIG <= value < _BIG else {"$int": hex(value)}
        if kind is str:
            self._count(len(value))
            return value
        if kind is float or isinstance(value, np.float64):
            number = float(value)
            return number if number - number == 0 else {"$float": repr(number)}
        if kind is bytes:
            self._count(len(value))
            return {"$bytes": base64.b64encode(value).decode()}
        if kind is list:
            return [self.convert(inner, f"{where}[{i}]", depth + 1) for i, inner in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.convert(inner, f"{where}[{i}]", depth + 1) for i, inner in enumerate(value)]}
        if kind is dict:
            return {
                self._key(key, where): self.convert(inner, f"{where}[{key!r}]", depth + 1)
                for key, inner in value.items()
            }
        raise TypeError(f"{where} is of type {kind.__name__}{_instead(value)}")

    def _key(self, key: object, where: str) -> str:
        if type(key) is not str:
            raise TypeError(
                f"{where} has the key {key!r} of type {type(key).__name__}: keys are str (a list of pairs can have any)"
            )
        self._count(len(key))
        return f"${key}" if key.startswith("$") else key

    def _count(self, size: int) -> None:
        self._least += size
        if self._least > COUNTED * self._limit:
            raise too_large(f"more than {format_size(COUNTED * self._limit)}", self._limit)


def _instead(value: object) -> str:
    """Suggest a type to use instead of one that cannot be encoded."""
    for kind, advice in _ADVICE.items():
        if isinstance(value, kind):
            return f": {advice}"
    return ": expected dict, list, tuple, str, int, float, bool, None or bytes"


_ADVICE: Final[Mapping[type, str]] = {
    np.ndarray: "use guest.array for arrays, or .tolist()",
    np.generic: "use .item()",
    set: "use a dict with True as values, or a sorted list",
    frozenset: "use a dict with True as values, or a sorted list",
    bytearray: "use bytes",
    dict: "use a plain dict",
    list: "use a plain list",
}


def decode(text: bytes | str) -> Any:
    """Decode the text that encode() made. Raises ValueError for any other text."""
    try:
        if isinstance(text, bytes):
            text = text.decode("ascii")
        return _restore(parse_json(text, unique_keys=True), 0)
    except (UnicodeDecodeError, JsonError) as error:
        raise ValueError(f"no JSON in ASCII ({error})") from None


def _restore(raw: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(raw, list):
        return [_restore(inner, depth + 1) for inner in raw]
    if not isinstance(raw, dict):
        return raw
    if len(raw) == 1:
        ((key, inner),) = raw.items()
        if key.startswith("$") and not key.startswith("$$"):
            return _restore_tagged(key, inner, depth)
    return {_restore_key(key): _restore(inner, depth + 1) for key, inner in raw.items()}


def _restore_key(key: str) -> str:
    if not key.startswith("$"):
        return key
    if not key.startswith("$$"):
        raise ValueError(f"the tag '{key}' beside other keys")
    return key[1:]


def _restore_tagged(tag: str, inner: Any, depth: int) -> Any:
    if tag == "$tuple" and isinstance(inner, list):
        return tuple(_restore(one, depth + 1) for one in inner)
    if tag in _TAGS and isinstance(inner, str):
        return _TAGS[tag](inner)
    raise ValueError(f"the tag '{tag}' with {type(inner).__name__}")


def _special(text: str) -> float:
    if text not in _SPECIAL:
        raise ValueError(f"'{text}' as a float")
    return _SPECIAL[text]


_TAGS: Final[Mapping[str, Callable[[str], Any]]] = {
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$int": lambda text: int(text, 16),
    "$float": _special,
}


# -- random generators -------------------------------------------------------------------------------------------------

GENERATORS: Final = ("numpy", "random")
GENERATOR_LIMIT: Final = 1 << 16
"""Maximum size of a generator's state as text, in bytes."""


def check_generator(kind: str, state: Any) -> None:
    """Raises ValueError for anything but a state of numpy's PCG64, or of Python's random.Random."""
    if not (_is_pcg64(state) if kind == "numpy" else _is_mersenne(state)):
        raise ValueError(f"no state of a generator of kind '{kind}'")


def _is_pcg64(state: Any) -> bool:
    if not isinstance(state, dict) or set(state) != {"bit_generator", "state", "has_uint32", "uinteger"}:
        return False
    inner = state["state"]
    return (
        state["bit_generator"] == "PCG64"
        and isinstance(inner, dict)
        and set(inner) == {"state", "inc"}
        and all(_is_unsigned(inner[name], 128) for name in inner)
        and _is_unsigned(state["has_uint32"], 1)
        and _is_unsigned(state["uinteger"], 32)
    )


def _is_mersenne(state: Any) -> bool:
    """(3, (624 words and the position), the next Gaussian)."""
    if not isinstance(state, tuple) or len(state) != 3 or state[0] != 3:
        return False
    words, gauss = state[1:]
    return (
        isinstance(words, tuple)
        and len(words) == 625
        and all(_is_unsigned(word, 32) for word in words)
        and words[-1] <= 624
        and (gauss is None or type(gauss) is float)
    )


def _is_unsigned(value: Any, bits: int) -> bool:
    return type(value) is int and 0 <= value < 1 << bits
