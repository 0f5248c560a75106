"""A program's fields as a VMState: the table is made from what the guest's process said of its class.

The law: the state object has the fields as they go onto the wire: numbers, truth values, and bytes for text as well.
The engine never sees the class itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from corefw.machine import Device
from corefw.wire.vmstate import Buffer, Kind, Refused, Scalar, VMState
from corefw.wire.vmstate.fields import Field
from corefw_machine_python.declarations import FieldType

SET_UP: Final = "set-up"
"""Whether setup() was called. The dash keeps it apart from every field of a program."""

LAYOUT: Final = "array-layout"
"""A digest of names, dtypes and shapes of the arrays: equal sizes alone do not make them the same."""

_DIGEST: Final = 16


class ProgramState:
    """The fields by their names, and the two above."""


def make_device(loaded: Mapping[str, Any]) -> Device:
    """The device of a program, from the answer to "load"."""
    name = f"program/{loaded['name']}"
    layout = hashlib.sha256(json.dumps(loaded["arrays"]).encode()).digest()[:_DIGEST]
    texts = [field["name"] for field in loaded["fields"] if FieldType.parse(field["type"]).kind == "str"]
    state = ProgramState()
    setattr(state, SET_UP, False)
    setattr(state, LAYOUT, layout)

    def post_load(state: object, _version_id: int) -> None:
        if getattr(state, LAYOUT) != layout:
            setattr(state, LAYOUT, layout)
            arrays = ", ".join(f"{one['name']} {one['shape']}" for one in loaded["arrays"])
            raise Refused(f"arrays as they are here ({arrays})", "other names, shapes or dtypes")
        for text in texts:
            try:
                getattr(state, text).decode()
            except UnicodeDecodeError:
                raise Refused(f"UTF-8 in field '{text}'", repr(getattr(state, text))) from None

    try:
        table = VMState(
            name,
            version_id=loaded["version"],
            minimum_version_id=loaded["minimum_version"],
            fields=(Scalar(SET_UP, Kind.BOOL), Buffer(LAYOUT, _DIGEST), *(_row(field) for field in loaded["fields"])),
            post_load=post_load,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"program '{loaded['name']}': {error}") from None
    device = Device(name, 0, table, state)
    set_values(device, loaded["fields"], loaded["values"])
    return device


def _row(field: Mapping[str, Any]) -> Field:
    kind = FieldType.parse(field["type"])
    if kind.size:
        return Buffer(field["name"], kind.size, since=field["since"])
    return Scalar(field["name"], Kind(kind.kind), since=field["since"])


def set_values(device: Device, fields: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> None:
    """What the guest said, into the state."""
    for field, value in zip(fields, values, strict=True):
        setattr(device.state, field["name"], bytes.fromhex(value) if isinstance(value, str) else value)


def get_values(device: Device, fields: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The state, as it is said to the guest."""
    values = [getattr(device.state, field["name"]) for field in fields]
    return [bytes(value).hex() if isinstance(value, bytes | bytearray) else value for value in values]


def show_values(device: Device, fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state for people, by name: text as text, bytes as hexadecimal digits."""
    shown = {}
    for field, value in zip(fields, get_values(device, fields), strict=True):
        text = FieldType.parse(field["type"]).kind == "str"
        shown[field["name"]] = bytes.fromhex(value).rstrip(b"\0").decode(errors="replace") if text else value
    return shown
