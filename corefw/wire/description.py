"""The JSON description at the end of a stream: the shapes of the device sections, for tools that have no loaders.

Invariant: the description is not trusted. It is parsed into these few types or refused, and its sizes are only added up
and compared with the bytes that arrived. If a name occurs twice in one JSON object, the last one counts (QEMU writes
such objects for lists, with the members of each element one after another).

    Description -> DeviceDescription -> StateDescription -> FieldDescription -> StateDescription ...

Source: QEMU 7.2's vmstate_save_state_v and vmsd_desc_field_start (migration/vmstate.c), vmstate_save_old_style
(savevm.c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from corefw.errors import StreamError
from corefw.jsontext import JsonError, parse_json

MAX_DEPTH: Final = 64
"""Structs within structs; QEMU has about ten levels."""

SUBSECTION_HEAD: Final = 1 + 1 + 4
"""Bytes around a subsection's name: type byte, the name's length, u32 version."""


@dataclass(frozen=True, slots=True)
class FieldDescription:
    """One field, or `count` equal ones in a row.

    size     bytes of one element; total: of all of them
    index    its place in an array whose elements are described one by one
    struct   its state, if QEMU describes it
    """

    name: str
    type: str
    size: int
    count: int = 1
    index: int | None = None
    struct: StateDescription | None = None
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.size * self.count)


@dataclass(frozen=True, slots=True)
class StateDescription:
    """A VMState as it was sent: fields, then subsections with a header each.

    size    bytes on the wire, without this state's own header
    """

    vmsd_name: str
    version: int
    fields: tuple[FieldDescription, ...]
    subsections: tuple[StateDescription, ...] = ()
    size: int = field(init=False)

    def __post_init__(self) -> None:
        # Computed once, because the size of a nested state is asked for at every level.
        inner = sum(SUBSECTION_HEAD + len(one.vmsd_name.encode()) + one.size for one in self.subsections)
        object.__setattr__(self, "size", sum(one.total for one in self.fields) + inner)


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """One FULL section."""

    name: str
    instance_id: int
    state: StateDescription

    def __str__(self) -> str:
        return f"'{self.name}' (instance {self.instance_id})"


@dataclass(frozen=True, slots=True)
class Description:
    """The devices in the order of the stream. `page_size` is the target's, 0 if it is not given."""

    page_size: int
    devices: tuple[DeviceDescription, ...]


def parse_description(text: bytes) -> Description:
    """Parse a description. Raises StreamError that names the place in the JSON that is not as expected."""
    try:
        document = parse_json(text)
    except JsonError as error:
        raise StreamError(f"the description is not JSON: {error}") from None
    top = _object(document, "description")
    page_size = _integer(top, "page_size", "description") if "page_size" in top else 0
    devices = tuple(
        _device(_object(one, f"devices[{at}]")) for at, one in enumerate(_list(top, "devices", "description"))
    )
    return Description(page_size, devices)


def _device(entry: Mapping[str, object]) -> DeviceDescription:
    name = _text(entry, "name", "a device")
    return DeviceDescription(name, _integer(entry, "instance_id", _cut(name)), _state(entry, _cut(name), 0))


def _state(entry: Mapping[str, object], where: str, depth: int) -> StateDescription:
    if depth > MAX_DEPTH:
        raise StreamError(f"the description of {where} is nested deeper than {MAX_DEPTH} levels")
    return StateDescription(
        # An old-style handler is not a VMState and has neither name nor version.
        _text(entry, "vmsd_name", where) if "vmsd_name" in entry else "",
        _integer(entry, "version", where) if "version" in entry else 0,
        tuple(_field(_object(one, where), where, depth) for one in _list(entry, "fields", where)),
        tuple(
            _state(_object(one, where), where, depth + 1)
            for one in (_list(entry, "subsections", where) if "subsections" in entry else [])
        ),
    )


def _field(entry: Mapping[str, object], where: str, depth: int) -> FieldDescription:
    name = _text(entry, "name", where)
    inner = f"{where}.{_cut(name)}"
    # A "struct" is an object of its own; lists and temporary states put its members into the field's object.
    struct = _object(entry["struct"], inner) if "struct" in entry else entry if "fields" in entry else None
    return FieldDescription(
        name,
        _text(entry, "type", inner),
        _integer(entry, "size", inner),
        _integer(entry, "array_len", inner) if "array_len" in entry else 1,
        _integer(entry, "index", inner) if "index" in entry else None,
        None if struct is None else _state(struct, inner, depth + 1),
    )


def _object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise StreamError(f"the description of {where}: expected an object, got {_shown(value)}")
    return value


def _list(entry: Mapping[str, object], name: str, where: str) -> list[object]:
    value = entry.get(name)
    if not isinstance(value, list):
        raise StreamError(f"the description of {where}: expected a list '{name}', got {_shown(value)}")
    return value


def _text(entry: Mapping[str, object], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise StreamError(f"the description of {where}: expected a text '{name}', got {_shown(value)}")
    if not value.isascii() and _has_surrogates(value):
        raise StreamError(
            f"the description of {where}: expected a text '{name}', got {_shown(value)}, half a character"
        )
    return value


def _has_surrogates(text: str) -> bool:
    """Whether an escape in the JSON made half a surrogate pair, which cannot be encoded."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _integer(entry: Mapping[str, object], name: str, where: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise StreamError(f"the description of {where}: expected a number '{name}' of 64 bits, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value from the peer, short enough for a message."""
    return _cut(repr(value) if not isinstance(value, (dict, list)) else type(value).__name__)


def _cut(text: str) -> str:
    """Shorten a name: the path to a field has one for each level."""
    return text if len(text) <= 40 else text[:37] + "..."
