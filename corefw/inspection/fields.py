"""Decodes the values in a device section by the shape in the description.

A value whose size does not match its type is shown as bytes, and long values are summarised, so nothing is left out.
All integers are big-endian; "le" in QEMU's type names means "less or equal". A name that occurs again in one state
becomes a list, as in QEMU's scripts/analyze-migration.py: QEMU 7.2 numbers the elements of an array (`index`), 10.0
numbers all but the last one and splits arrays with null pointers (`array_len`).

Source: vmstate_info_* (migration/vmstate-types.c) and vmsd_desc_field_start (migration/vmstate.c) of QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from struct import Struct
from typing import Final

from corefw.jsontext import JsonError, parse_json
from corefw.wire.description import MAX_DEPTH, SUBSECTION_HEAD, DeviceDescription, FieldDescription, StateDescription

SHORT: Final = 32
"""Values of at most this many bytes are shown in full."""

LISTED: Final = 64
"""Arrays of at most this many elements are shown element by element."""

MAX_VALUES: Final = 1_000_000
"""Values that are decoded in one inspection; a machine with 255 processors has about a quarter of that. The size of a
section does not limit them, since a description can claim more fields than the section has bytes."""

NOT_DECODED: Final = "(not decoded)"
"""The name under which a state's bytes are summarised once MAX_VALUES are decoded."""

SUBSECTIONS: Final = "(subsections)"
"""The name of a state's subsections among its fields; no field is called that."""

_DOUBLE: Final = Struct(">d")

_INTEGER: Final = re.compile(r"(u?)int(8|16|32|64)( equal| le| gez)?\Z")


class ValueBudget:
    """How many more values an inspection may decode. Once it is used up, the rest is shown as bytes."""

    def __init__(self, values: int = MAX_VALUES) -> None:
        self._left = values

    def take(self, values: int) -> bool:
        """Whether that many may be decoded. After the first refusal no more may."""
        self._left = self._left - values if values <= self._left else 0
        return self._left > 0


def device_fields(device: DeviceDescription, data: bytes, budget: ValueBudget | None = None) -> dict[str, object]:
    """JSON values by field name. `data` is the section's body, as long as the description says.

    Once `budget` (by default a new one) is used up, bytes are summarised instead.
    """
    return _state(device.state, memoryview(data), budget or ValueBudget())


def _state(state: StateDescription, data: memoryview, budget: ValueBudget) -> dict[str, object]:
    if not budget.take(1 + len(state.fields) + len(state.subsections)):
        return {NOT_DECODED: _bytes(data)}
    values: dict[str, object] = {}
    repeated: set[str] = set()
    at, before = 0, ""
    for field in state.fields:
        part = data[at : at + field.total]
        value = _json_value(part, budget) if before == f"{field.name}.size" and field.type == "buffer" else _NO_JSON
        _put(values, repeated, field, _elements(field, part, budget) if value is _NO_JSON else value)
        at, before = at + field.total, field.name
    subsections: dict[str, object] = {}
    for one in state.subsections:
        at += SUBSECTION_HEAD + len(one.vmsd_name.encode())
        subsections[one.vmsd_name] = _state(one, data[at : at + one.size], budget)
        at += one.size
    if subsections:
        values[SUBSECTIONS] = subsections
    return values


def _put(values: dict[str, object], repeated: set[str], field: FieldDescription, value: object) -> None:
    """Add a value. `repeated` holds the names whose value is a list of several fields' values."""
    name = field.name
    elements = value if field.count > 1 and isinstance(value, list) else [value]
    if name not in values:
        values[name] = [value] if field.index is not None else value
        if field.index is not None or elements is value:
            repeated.add(name)
        return
    if name not in repeated:
        values[name] = [values[name]]
        repeated.add(name)
    before = values[name]
    assert isinstance(before, list)
    before.extend(elements)


def _elements(field: FieldDescription, data: memoryview, budget: ValueBudget) -> object:
    if field.count == 1:
        return _value(field, data, budget)
    if field.count > LISTED or field.size == 0 or not budget.take(field.count):
        return _bytes(data)
    return [_value(field, data[at : at + field.size], budget) for at in range(0, field.total, field.size)]


def _value(field: FieldDescription, data: memoryview, budget: ValueBudget) -> object:
    # A list (qtailq) is described by the shape of its last element.
    if field.struct is not None and field.struct.size == field.size:
        return _state(field.struct, data, budget)
    if integer := _INTEGER.match(field.type):
        if field.size * 8 == int(integer[2]):
            return int.from_bytes(data, "big", signed=not integer[1])
    elif field.type in _SCALARS:
        size, read = _SCALARS[field.type]
        if size == field.size:
            return read(data)
    return _bytes(data)


_NO_JSON: Final = object()


def _json_value(data: memoryview, budget: ValueBudget) -> object:
    """A guest.value of a Python program, which is JSON behind a field NAME.size. _NO_JSON for anything else."""
    text = bytes(data)
    if not budget.take(text.count(b",") + text.count(b"[") + text.count(b"{")):
        return _NO_JSON
    try:
        value = parse_json(text)
    except JsonError:
        return _NO_JSON
    return value if _is_shallow(value, MAX_DEPTH) else _NO_JSON


def _is_shallow(value: object, depth: int) -> bool:
    inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return depth > 0 and all(_is_shallow(one, depth - 1) for one in inner)


def _double(data: memoryview) -> object:
    """A number, or "inf", "-inf" or "nan", for which JSON has no number."""
    (value,) = _DOUBLE.unpack(data)
    return value if math.isfinite(value) else str(value)


_SCALARS: Final[Mapping[str, tuple[int, Callable[[memoryview], object]]]] = {
    "bool": (1, lambda data: data[0] != 0),
    "timer": (8, lambda data: int.from_bytes(data, "big", signed=True)),
    "float64": (8, _double),
    "CPU_Double_U": (8, _double),
    "nullptr": (1, lambda _: None),
}
"""Type -> (bytes, how to read it). A timer is its deadline in nanoseconds, -1 if it is off. QEMU's devices send doubles
as CPU_Double_U. A nullptr is an element that an array of pointers lacks (QEMU 10.0)."""


def _bytes(data: memoryview) -> object:
    """Bytes as text if they are text, as hexadecimal digits if they are few, else summarised."""
    raw = bytes(data)
    text = raw.rstrip(b"\0")
    if len(text) > 1 and text.isascii() and text.decode("ascii").isprintable():
        return text.decode("ascii")
    if len(raw) <= SHORT:
        return raw.hex()
    return {"bytes": len(raw), "zero": not text, "crc32": f"{zlib.crc32(raw):08x}"}
