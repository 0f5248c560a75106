"""A program's fields and sections as VMStates, made from the guest's description of its class.

The state object holds the fields in wire form: numbers, booleans, and bytes for everything else. Text of variable
length (guest.value, guest.rng) is a 32-bit size and that many bytes, like QEMU's VMSTATE_VBUFFER_UINT32. Each
guest.section has a VMState of its own on the same state object: the version of the program's format, a size, and that
many bytes. The engine never sees the class itself.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from corefw.machine import Device
from corefw.quantities import format_size
from corefw.wire.records import MAX_LAYOUT
from corefw.wire.stream import StreamReader
from corefw.wire.vmstate import Buffer, Kind, Refused, Scalar, VMState
from corefw.wire.vmstate.fields import Field
from corefw_machine_python import jsonlike
from corefw_machine_python.declarations import FieldType
from corefw_machine_python.layout import RAISE_VERSION, Layout, compare_fields, variable_limit

SET_UP: Final = "set-up"
"""Whether setup() was called. The dash keeps the name distinct from every field of a program."""

LAYOUT: Final = "array-layout"
"""A digest of the names, dtypes and shapes of the arrays: equal sizes are not enough."""

FIELDS: Final = "program-layout"
"""The program's layout, compared before any field is loaded. The section of this name, which precedes RAM, has the same
contents; this field protects against streams without that section."""

_DIGEST: Final = 16
MAX_NAME: Final = 255
"""Maximum bytes of a section's name."""
_SHOWN: Final = 200
"""Longest value that is shown, in characters; of longer ones only the size."""


class ProgramState:
    """The fields by name, the three above, and the sizes of values of variable length."""


@dataclass(frozen=True, slots=True)
class _CheckedBuffer(Buffer):
    """A buffer that is checked before anything after it is loaded."""

    check: Callable[[bytes], None] = field(kw_only=True)

    def load(self, reader: StreamReader, state: object) -> None:
        Buffer.load(self, reader, state)
        try:
            self.check(bytes(self.held(state)))
        except Refused as error:
            raise reader.error(error.expected, error.got) from None


def make_devices(loaded: Mapping[str, Any]) -> list[Device]:
    """Make the devices of a program from the guest's answer to "load": one with the fields, and one per guest.section.
    They share one state. Raises ValueError."""
    device = _make_device(loaded)
    sections = [_make_section(loaded, one, device.state) for one in loaded["fields"] if is_section(one["type"])]
    set_values(device, loaded["fields"], loaded["values"])
    return [device, *sections]


def _make_section(loaded: Mapping[str, Any], one: Mapping[str, Any], state: object) -> Device:
    name = one["name"]
    oldest, newest = one["versions"]
    key = f"program/{loaded['name']}/{name}"
    if len(key.encode()) > MAX_NAME:
        raise ValueError(f"program '{loaded['name']}': the name of section '{name}' is too long")

    def post_load(state: object, _version_id: int) -> None:
        version = getattr(state, _version(name))
        if not oldest <= version <= newest:
            raise Refused(f"version {oldest} to {newest} of the format of section '{name}'", str(version))

    table = VMState(
        key,
        fields=(
            Scalar(_version(name), Kind.U32),
            Scalar(_size(name), Kind.U32),
            Buffer(name, _size(name), limit=variable_limit(one["type"])),
        ),
        # An older version of the program does not send it: then it keeps its first value.
        needed=None if one["since"] <= loaded["minimum_version"] else lambda _state: True,
        post_load=post_load,
    )
    return Device(key, 0, table, state)


def _make_device(loaded: Mapping[str, Any]) -> Device:
    name = f"program/{loaded['name']}"
    arrays = hashlib.sha256(json.dumps(loaded["arrays"]).encode()).digest()[:_DIGEST]
    layout = Layout.of(loaded)
    try:
        packed = layout.pack()
    except ValueError as error:
        raise ValueError(f"program '{loaded['name']}': {error}") from None

    def own_layout(state: object) -> None:
        setattr(state, LAYOUT, arrays)
        _set_sized(state, FIELDS, packed)

    def post_load(state: object, _version_id: int) -> None:
        if getattr(state, LAYOUT) != arrays:
            here = ", ".join(f"{one['name']} {one['shape']}" for one in loaded["arrays"])
            raise Refused(f"arrays as they are here ({here})", "other names, shapes or dtypes")
        for one in loaded["fields"]:
            if not is_section(one["type"]):
                _check_loaded(one, getattr(state, one["name"]))

    state = ProgramState()
    setattr(state, SET_UP, False)
    own_layout(state)
    try:
        table = VMState(
            name,
            version_id=loaded["version"],
            minimum_version_id=loaded["minimum_version"],
            fields=(
                Scalar(SET_UP, Kind.BOOL),
                Buffer(LAYOUT, _DIGEST),
                Scalar(_size(FIELDS), Kind.U32),
                _CheckedBuffer(FIELDS, _size(FIELDS), limit=MAX_LAYOUT, check=lambda data: _check_fields(layout, data)),
                *(row for one in loaded["fields"] if not is_section(one["type"]) for row in _rows(one)),
            ),
            post_load=post_load,
            pre_save=own_layout,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"program '{loaded['name']}': {error}") from None
    return Device(name, 0, table, state)


def is_section(type_name: str) -> bool:
    return type_name.startswith("section[")


def _size(name: str) -> str:
    """Name of a buffer's size. The dot keeps it distinct from every field of a program."""
    return f"{name}.size"


def _version(name: str) -> str:
    """Name of the version of a section's format."""
    return f"{name}.version"


def _set_sized(state: object, name: str, data: bytes) -> None:
    setattr(state, _size(name), len(data))
    setattr(state, name, data)


def _rows(one: Mapping[str, Any]) -> tuple[Field, ...]:
    name, since = one["name"], one["since"]
    limit = variable_limit(one["type"])
    if limit is not None:
        return Scalar(_size(name), Kind.U32, since=since), Buffer(name, _size(name), limit=limit, since=since)
    kind = FieldType.parse(one["type"])
    if kind.size:
        return (Buffer(name, kind.size, since=since),)
    return (Scalar(name, Kind(kind.kind), since=since),)


def _check_fields(here: Layout, data: bytes) -> None:
    try:
        there = Layout.unpack(data)
    except ValueError as error:
        raise Refused(f"the layout of program '{here.program}'", str(error)) from None
    if different := compare_fields(here.fields, there.fields, there.version):
        raise Refused(
            f"the fields that program '{here.program}' has here",
            f"other fields: {'; '.join(different)} ({RAISE_VERSION})",
        )


def _check_loaded(one: Mapping[str, Any], value: Any) -> None:
    """Raises Refused for a value that the guest's process would not accept."""
    name, type_name = one["name"], one["type"]
    try:
        if type_name.startswith("str["):
            value.decode()
        elif variable_limit(type_name) is not None:
            decoded = jsonlike.decode(value)
            if type_name.startswith("rng["):
                jsonlike.check_generator(type_name[4:-1], decoded)
    except UnicodeDecodeError:
        raise Refused(f"UTF-8 in field '{name}'", repr(value)) from None
    except ValueError as error:
        raise Refused(f"a {type_name} in field '{name}'", str(error)) from None


def set_values(device: Device, fields: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> None:
    """Store the guest's values in the state."""
    for one, value in zip(fields, values, strict=True):
        if is_section(one["type"]):
            version, _, data = value.partition(":")
            setattr(device.state, _version(one["name"]), int(version))
            _set_sized(device.state, one["name"], b64decode(data))
        elif variable_limit(one["type"]) is not None:
            _set_sized(device.state, one["name"], value.encode())
        else:
            setattr(device.state, one["name"], bytes.fromhex(value) if isinstance(value, str) else value)


def get_values(device: Device, fields: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Read the values from the state, in the form for the guest."""
    return [_for_guest(one, device.state) for one in fields]


def _for_guest(one: Mapping[str, Any], state: object) -> Any:
    value = getattr(state, one["name"])
    if is_section(one["type"]):
        return f"{getattr(state, _version(one['name']))}:{b64encode(value).decode()}"
    if variable_limit(one["type"]) is not None:
        return bytes(value).decode("ascii")
    return bytes(value).hex() if isinstance(value, bytes | bytearray) else value


def show_values(fields: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> dict[str, Any]:
    """The guest's values by name, for display: text as text, bytes as hexadecimal digits, long values as their size;
    sections are left out."""
    pairs = zip(fields, values, strict=True)
    return {one["name"]: _shown(one["type"], value) for one, value in pairs if not is_section(one["type"])}


def _shown(type_name: str, value: Any) -> Any:
    if type_name.startswith("str["):
        return bytes.fromhex(value).rstrip(b"\0").decode(errors="replace")
    if type_name.startswith("rng["):
        return f"a generator ({type_name[4:-1]})"
    if type_name.startswith("value["):
        return value if len(value) <= _SHOWN else f"a value of {format_size(len(value))}"
    return value


def value_sizes(fields: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> dict[str, int]:
    """Sizes in the stream of values of variable length, in bytes, by name."""
    pairs = zip(fields, values, strict=True)
    return {
        one["name"]: len(value)
        for one, value in pairs
        if variable_limit(one["type"]) is not None and not is_section(one["type"])
    }
