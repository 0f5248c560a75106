"""The values in a device section, read by the shape that the description gives.

The law: a value is shown as what QEMU calls it where its size agrees, else as bytes; nothing is left out, and what is
long is summed up. All integers are big-endian, the "le" in QEMU's type names means "less or equal".

Source: QEMU 7.2's vmstate_info_* (migration/vmstate-types.c).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Final

from corefw.wire.description import SUBSECTION_HEAD, DeviceDescription, FieldDescription, StateDescription

SHORT: Final = 32
"""Bytes that are shown in full."""

LISTED: Final = 64
"""Elements of an array that are shown one by one."""

SUBSECTIONS: Final = "(subsections)"
"""Where a state's subsections stand among its fields; no field has such a name."""

_INTEGER: Final = re.compile(r"(u?)int(8|16|32|64)( equal| le| gez)?\Z")


def device_fields(device: DeviceDescription, data: bytes) -> dict[str, object]:
    """JSON values by field name. `data` is the section's body, as long as the description says."""
    return _state(device.state, memoryview(data))


def _state(state: StateDescription, data: memoryview) -> dict[str, object]:
    values: dict[str, object] = {}
    at = 0
    for field in state.fields:
        _put(values, field, _elements(field, data[at : at + field.total]))
        at += field.total
    subsections: dict[str, object] = {}
    for one in state.subsections:
        at += SUBSECTION_HEAD + len(one.vmsd_name.encode())
        subsections[one.vmsd_name] = _state(one, data[at : at + one.size])
        at += one.size
    if subsections:
        values[SUBSECTIONS] = subsections
    return values


def _put(values: dict[str, object], field: FieldDescription, value: object) -> None:
    """Elements that are described one by one become a list; another field of the same name gets a number."""
    if field.index is not None:
        elements = values.setdefault(field.name, [])
        if isinstance(elements, list):
            elements.append(value)
            return
    name, number = field.name, 2
    while name in values:
        name, number = f"{field.name} #{number}", number + 1
    values[name] = value


def _elements(field: FieldDescription, data: memoryview) -> object:
    if field.count == 1:
        return _value(field, data)
    if field.count > LISTED or field.size == 0:
        return _bytes(data)
    return [_value(field, data[at : at + field.size]) for at in range(0, field.total, field.size)]


def _value(field: FieldDescription, data: memoryview) -> object:
    # A list (qtailq) has the shape of its last element only, which is not its own.
    if field.struct is not None and field.struct.size == field.size:
        return _state(field.struct, data)
    if integer := _INTEGER.match(field.type):
        if field.size * 8 == int(integer[2]):
            return int.from_bytes(data, "big", signed=not integer[1])
    elif field.type in _SCALARS:
        size, read = _SCALARS[field.type]
        if size == field.size:
            return read(data)
    return _bytes(data)


_SCALARS: Final[Mapping[str, tuple[int, Callable[[memoryview], object]]]] = {
    "bool": (1, lambda data: data[0] != 0),
    "timer": (8, lambda data: int.from_bytes(data, "big", signed=True)),
}
"""Type -> (bytes, how to read it). A timer is its deadline in nanoseconds, -1 when it is off."""


def _bytes(data: memoryview) -> object:
    """Text where it is text, digits where it is short, else a summary."""
    raw = bytes(data)
    text = raw.rstrip(b"\0")
    if len(text) > 1 and text.isascii() and text.decode("ascii").isprintable():
        return text.decode("ascii")
    if len(raw) <= SHORT:
        return raw.hex()
    return {"bytes": len(raw), "zero": not text, "crc32": f"{zlib.crc32(raw):08x}"}
