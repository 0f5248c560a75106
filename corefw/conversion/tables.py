"""Compares the devices in a stream with what a QEMU can load, from the output of its option `-dump-vmstate`.

The tables hold the types of devices that a QEMU was built with. State that is registered by other means is not in them
(processors, timers, interrupt controllers of some boards), so a device that is not in the tables is not judged.

    DeviceTables -> StateTable -> FieldTable -> StateTable ...

Source: dump_vmstate_json_to_file (migration/savevm.c) and vmstate_load_state (migration/vmstate.c) of QEMU 10.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Final, TypeVar

from corefw.errors import MigfwError
from corefw.jsontext import parse_json
from corefw.wire.description import DeviceDescription, FieldDescription, StateDescription
from corefw.wire.records import SectionHeader

MACHINE: Final = "vmschkmachine"
UNUSED: Final = "unused"
MAX_DEPTH: Final = 64

_Value = TypeVar("_Value")
_SCALAR: Final = re.compile(r"bool|u?int(8|16|32|64)( .*)?|timer|CPU_Double_U|float64")
_NUMBERED: Final = re.compile(r"(.+)\[\d+\]\Z")


@dataclass(frozen=True, slots=True)
class FieldTable:
    """One field.

    version    the first version of the state that has it
    optional   a function decides instead whether the stream has it
    size       bytes of one element in memory
    """

    name: str
    version: int
    optional: bool
    size: int
    state: StateTable | None


@dataclass(frozen=True, slots=True)
class StateTable:
    """A VMStateDescription, which loads the versions from `minimum` to `version`."""

    name: str
    version: int
    minimum: int
    fields: tuple[FieldTable, ...]
    subsections: tuple[StateTable, ...]

    def fields_of(self, version: int) -> tuple[FieldTable, ...]:
        return tuple(field for field in self.fields if field.optional or field.version <= version)

    def subsection(self, name: str) -> StateTable | None:
        return next((one for one in self.subsections if one.name == name), None)


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """The states of a QEMU's devices by name. Several types may share a name, and differ."""

    machine: str
    states: Mapping[str, tuple[StateTable, ...]]


def read_tables(text: bytes) -> DeviceTables:
    """Parse what `qemu-system-x86_64 -M TYPE -dump-vmstate FILE` wrote. Raises MigfwError."""
    try:
        document = _checked(parse_json(text), "the document", dict)
        machine = _get(_get(document, MACHINE, dict), "Name", str)
        states: dict[str, dict[StateTable, None]] = {}
        for name, entry in document.items():
            if name != MACHINE:
                state = _state(_get(entry, "Description", dict), 0)
                states.setdefault(state.name, {})[state] = None
    except ValueError as error:
        raise MigfwError(f"not the output of QEMU's -dump-vmstate: {error}") from None
    return DeviceTables(machine, {name: tuple(found) for name, found in states.items()})


def _state(entry: dict[str, object], depth: int) -> StateTable:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return StateTable(
        _get(entry, "name", str),
        _get(entry, "version_id", int),
        _get(entry, "minimum_version_id", int),
        tuple(_field(_checked(one, "a field", dict), depth) for one in _get(entry, "Fields", list, [])),
        tuple(_state(_checked(one, "a subsection", dict), depth + 1) for one in _get(entry, "Subsections", list, [])),
    )


def _field(entry: dict[str, object], depth: int) -> FieldTable:
    state = _get(entry, "Description", dict, None) if "Description" in entry else None
    return FieldTable(
        _get(entry, "field", str),
        _get(entry, "version_id", int),
        _get(entry, "field_exists", bool),
        _get(entry, "size", int),
        None if state is None else _state(state, depth + 1),
    )


def _get(entry: object, name: str, kind: type[_Value], default: _Value | None = None) -> _Value:
    found = _checked(entry, f"what has '{name}'", dict).get(name, default)
    return _checked(found, f"'{name}'", kind)


def _checked(value: object, what: str, kind: type[_Value]) -> _Value:
    if not isinstance(value, kind):
        raise ValueError(f"expected {what} to be a {kind.__name__}, got {type(value).__name__}")
    return value


# -- comparison --------------------------------------------------------------------------------------------------------


def is_doubtful(device: DeviceDescription | None, source: DeviceTables | None, target: DeviceTables) -> bool:
    """Whether the device is only in the source's tables: the target may register its state by other means (the IDE
    controller of QEMU 7.2, the PS/2 keyboard of 5.2), or lack it."""
    name = "" if device is None else device.state.vmsd_name
    return source is not None and name in source.states and name not in target.states


def compare(
    header: SectionHeader, device: DeviceDescription | None, source: DeviceTables | None, target: DeviceTables
) -> list[str] | None:
    """The parts of a section that the target will not load, as phrases; None if the device is not in its tables.

    A field of the target that is not in the stream may be new, or have no elements. Only the source's tables can tell,
    so such fields are reported only with them.
    """
    if device is None or not device.state.vmsd_name:
        return None
    name = device.state.vmsd_name
    candidates = target.states.get(name)
    origins = source.states.get(name, ()) if source is not None else ()
    if candidates is None:
        return None
    # Types that share a name differ in details. The machine has the one that fits best.
    judged = [
        list(_judge(str(header), header.version_id, device.state, origin, candidate))
        for candidate in candidates
        for origin in origins or (None,)
    ]
    return min(judged, key=len)


def _judge(
    where: str, version: int, state: StateDescription, origin: StateTable | None, target: StateTable
) -> Iterator[str]:
    """Judge a state that carries its version: a section or a subsection."""
    if version > target.version:
        yield f"{where}: version {version} is too new, the target loads up to {target.version}"
    elif version < target.minimum:
        yield f"{where}: version {version} is too old, the target loads {target.minimum} and newer"
    else:
        yield from _judge_fields(where, version, state, origin, target)


def _judge_fields(
    where: str, version: int, state: StateDescription, origin: StateTable | None, target: StateTable
) -> Iterator[str]:
    expected = target.fields_of(version)
    before = None if origin is None else _by_name(origin.fields_of(state.version))
    sent = _runs(state.fields, target)
    at = place = 0
    while place < len(sent):
        run = sent[place]
        if (taken := _unused(sent[place:], expected[at:])) is not None:
            place, at = place + taken[0], at + taken[1]
            continue
        place += 1
        found = next((number for number in range(at, len(expected)) if run.is_of(expected[number])), None)
        if found is None and at < len(expected) and _is_renamed(run, expected[at], before):
            at += 1
        elif found is None:
            yield f"{where}: the target has no field '{run.name}'"
        else:
            yield from _new_fields(where, expected[at:found], before)
            at = found + 1
            alike = [one for one in expected if run.is_of(one)]
            origins = [one for one in (before or {}).get(run.name, []) if run.is_of(one)]
            yield from _judge_field(f"{where}, field '{run.name}'", run.field, origins, alike)
    yield from _new_fields(where, expected[at:], before)
    for one in state.subsections:
        subsection = target.subsection(one.vmsd_name)
        inner = f"{where}, subsection '{one.vmsd_name}'"
        if subsection is None:
            yield f"{inner}: the target does not have it"
        else:
            yield from _judge(inner, one.version, one, origin and origin.subsection(one.vmsd_name), subsection)


@dataclass(frozen=True, slots=True)
class _Run:
    """A field, or the elements of an array that are described one by one; `size`: bytes of all."""

    name: str
    field: FieldDescription
    size: int

    @property
    def is_unused(self) -> bool:
        return self.field.type == "unused_buffer"

    def is_of(self, table: FieldTable) -> bool:
        """Whether this is the table's field: a device with MSI-X has two `parent_obj` with different states."""
        struct = self.field.struct
        same = struct is None or table.state is None or struct.vmsd_name == table.state.name
        return self.name == table.name and same


def _runs(fields: Sequence[FieldDescription], target: StateTable) -> list[_Run]:
    def kind(field: FieldDescription) -> tuple[str, str, str]:
        struct = "" if field.struct is None else field.struct.vmsd_name
        return _base_name(field, target), "" if field.type == "nullptr" else field.type, struct

    runs = []
    for (name, _, _), group in groupby(fields, key=kind):
        elements = list(group)
        runs.append(_Run(name, elements[-1], sum(field.total for field in elements)))
    return runs


def _unused(sent: Sequence[_Run], expected: Sequence[FieldTable]) -> tuple[int, int] | None:
    """If one side has unused bytes where the other has fields: how many runs and how many table fields to skip."""
    if not sent or not expected or sent[0].is_unused == (expected[0].name == UNUSED):
        return None
    if sent[0].is_unused:
        # Older tables lack the length of an array, so the run that follows shows where the fields end.
        after = next((run for run in sent if not run.is_unused), None)
        end = (number for number, one in enumerate(expected) if after is not None and after.is_of(one))
        count = next(end, len(expected) if after is None else 0)
        fits = count > 0 and sum(one.size for one in expected[:count]) <= sent[0].size
        return (1, count) if fits else None
    for count, total in enumerate(accumulate(run.size for run in sent), 1):
        if total >= expected[0].size:
            return (count, 1) if total == expected[0].size else None
    return None


def _by_name(fields: Iterable[FieldTable]) -> dict[str, list[FieldTable]]:
    """Fields by name; a name may occur more than once (PCIDevice has a `config` of 256 bytes or one of 4096)."""
    found: dict[str, list[FieldTable]] = {}
    for field in fields:
        found.setdefault(field.name, []).append(field)
    return found


def _base_name(field: FieldDescription, target: StateTable) -> str:
    """The name without the number that QEMU 10.0 gives fields of one state that share a name ("config[1]")."""
    numbered = _NUMBERED.match(field.name)
    if numbered is None or any(one.name == field.name for one in target.fields):
        return field.name
    return numbered[1]


def _is_renamed(run: _Run, expected: FieldTable, before: Mapping[str, object] | None) -> bool:
    """Whether the run is the expected field under another name. Names are not on the wire, so a scalar of the same size
    in the same place is the same field, unless the source has the expected field as well."""
    same = _SCALAR.fullmatch(run.field.type) is not None and run.field.size == expected.size
    return same and expected.state is None and (before is None or expected.name not in before)


def _new_fields(where: str, skipped: Iterable[FieldTable], before: Mapping[str, object] | None) -> Iterator[str]:
    for field in skipped:
        if not field.optional and before is not None and field.name not in before:
            yield f"{where}: the target expects a field '{field.name}' that the source does not have"


def _judge_field(
    where: str, field: FieldDescription, origins: Sequence[FieldTable], targets: Sequence[FieldTable]
) -> Iterator[str]:
    """`origins`, `targets`: the fields of that name on either side."""
    target = targets[0].state
    if target is not None:
        if field.struct is not None:
            # A struct's version is not on the wire: both sides take their own.
            origin = origins[0].state if origins else None
            yield from _judge_fields(where, target.version, field.struct, origin, target)
        return
    # For other than scalars the tables have the size in memory, which can only be compared with another such size.
    sizes = {field.size} if _SCALAR.fullmatch(field.type) else {one.size for one in origins}
    expected = {one.size for one in targets}
    if sizes and not sizes & expected:
        yield f"{where}: {_numbers(sizes)} bytes, the target expects {_numbers(expected)}"


def _numbers(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))
