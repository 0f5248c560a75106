"""For any table and values, loading returns what was saved, the description accounts for every byte, and a stream that
is cut anywhere is a RemoteStreamError."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corefw.errors import RemoteStreamError, StreamError
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from corefw.wire.vmstate import (
    Array,
    Buffer,
    Description,
    Field,
    Kind,
    Scalar,
    Struct,
    StructArray,
    Unused,
    VMState,
)

FEW = settings(max_examples=120)
LIMIT = 6
FOLLOWS = b"\x7e\0\0\0\7\0"
"""A footer and the end of the stream."""


@dataclass(frozen=True)
class Case:
    """A table, and the attributes of its state."""

    table: VMState
    values: dict[str, Any]


def value_of(kind: Kind) -> st.SearchStrategy[Any]:
    layout = kind.layout
    if layout.minimum is not None and layout.maximum is not None:
        return st.integers(layout.minimum, layout.maximum)
    return st.booleans() if kind is Kind.BOOL else st.floats(allow_nan=False)


KINDS = st.sampled_from(list(Kind))
COUNTS = st.integers(0, LIMIT)


@st.composite
def rows(draw: st.DrawFn, name: str, depth: int) -> tuple[list[Field], dict[str, Any]]:
    """One field, after the scalar with its length if it has one."""
    sort = draw(st.sampled_from(["scalar", "array", "buffer", "unused", "struct", "structs"][: 6 if depth else 4]))
    exists = draw(st.sampled_from([None, None, None, lambda _state, _version: True]))
    if sort == "scalar":
        kind = draw(KINDS)
        return [Scalar(name, kind, exists=exists)], {name: draw(value_of(kind))}
    if sort == "unused":
        return [Unused(draw(COUNTS), exists=exists)], {}
    if sort == "struct":
        inner = draw(cases("st" + name, depth - 1))
        row: Field = Struct(name, inner.table, make=SimpleNamespace, exists=exists)
        return [row], {name: SimpleNamespace(**inner.values)}
    count = draw(COUNTS)
    variable = draw(st.booleans())
    length: Any = "n" + name if variable else count
    more: dict[str, Any] = {"limit": LIMIT} if variable else {}
    before: list[Field] = [Scalar("n" + name, Kind.U8)] if variable else []
    values: dict[str, Any] = {"n" + name: count} if variable else {}
    if sort == "array":
        kind = draw(KINDS)
        row = Array(name, length, kind, exists=exists, **more)
        values[name] = draw(st.lists(value_of(kind), min_size=count, max_size=count))
    elif sort == "buffer":
        row = Buffer(name, length, exists=exists, **more)
        values[name] = draw(st.binary(min_size=count, max_size=count))
    else:
        inner = draw(cases("st" + name, depth - 1))
        row = StructArray(name, length, inner.table, make=SimpleNamespace, exists=exists, **more)
        values[name] = [SimpleNamespace(**inner.values) for _ in range(count)]
    return [*before, row], values


@st.composite
def cases(draw: st.DrawFn, name: str = "dev", depth: int = 2) -> Case:
    fields: list[Field] = []
    values: dict[str, Any] = {}
    for i in range(draw(st.integers(0, 4))):
        added, more = draw(rows(f"f{i}{name}", depth))
        fields += added
        values |= more
    subsections: list[VMState] = []
    for i in range(draw(st.integers(0, 2)) if depth else 0):
        sub = draw(cases(f"{name}/{i}", depth - 1))
        needed = draw(st.booleans())
        subsections.append(
            VMState(
                sub.table.name,
                fields=sub.table.fields,
                subsections=sub.table.subsections,
                needed=lambda _, needed=needed: needed,  # type: ignore[misc]
            )
        )
        if needed:
            values |= sub.values
    version = draw(st.integers(0, 3))
    table = VMState(name, version_id=version, fields=tuple(fields), subsections=tuple(subsections))
    return Case(table, values)


def saved(case: Case) -> tuple[bytes, Description]:
    sink = MemorySink()
    writer = StreamWriter(sink)
    description = case.table.save(writer, SimpleNamespace(**case.values))
    writer.flush()
    return bytes(sink.data), description


def empty(values: dict[str, Any]) -> SimpleNamespace:
    """An empty state, except for the lists into which lists are loaded."""
    return SimpleNamespace(**{name: [] for name, value in values.items() if isinstance(value, list)})


def load(case: Case, data: bytes) -> tuple[SimpleNamespace, int]:
    reader = StreamReader(MemorySource(data))
    state = empty(case.values)
    case.table.load(reader, state, case.table.version_id)
    return state, reader.offset


def normal(value: Any) -> Any:
    """Convert structs to dictionaries and arrays to lists, for comparison."""
    if isinstance(value, SimpleNamespace):
        inner = {name: normal(one) for name, one in vars(value).items()}
        return {name: one for name, one in inner.items() if one != []}  # a list may be there already, and stay empty
    if isinstance(value, list):
        return [normal(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def measure(described: Description) -> int:
    size: int = sum(entry["size"] * entry.get("array_len", 1) for entry in described["fields"])
    for entry in described["fields"]:
        if "struct" in entry:
            assert entry["size"] == measure(entry["struct"])
    for sub in described.get("subsections", ()):
        size += 2 + len(sub["vmsd_name"]) + 4 + measure(sub)
    return size


@FEW
@given(cases())
def test_round_trip_and_description(case: Case) -> None:
    body, description = saved(case)
    state, taken = load(case, body + FOLLOWS)
    assert taken == len(body)
    assert normal(state) == normal(SimpleNamespace(**case.values))
    assert measure(json.loads(json.dumps(description))) == len(body)


@FEW
@given(cases())
def test_cut_anywhere(case: Case) -> None:
    body, _ = saved(case)
    for at in range(len(body)):
        with pytest.raises(RemoteStreamError):
            load(case, body[:at])


@FEW
@given(cases(), st.data())
def test_damaged_anywhere(case: Case, data: st.DataObject) -> None:
    body, _ = saved(case)
    assume(body)
    at = data.draw(st.integers(0, len(body) - 1))
    changed = bytes([body[at] ^ data.draw(st.integers(1, 255))])
    try:
        load(case, body[:at] + changed + body[at + 1 :] + FOLLOWS)
    except StreamError as error:
        assert isinstance(error, RemoteStreamError)


@FEW
@given(cases(), st.binary(max_size=200))
def test_arbitrary_bytes(case: Case, data: bytes) -> None:
    try:
        load(case, data)
    except StreamError as error:
        assert isinstance(error, RemoteStreamError)
