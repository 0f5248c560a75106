"""The layout of a program as a document, and the comparison of two layouts.

The source sends its layout and the destination compares it with its own: two fields of the same size in another order
would be loaded into each other. `migfw check` uses the same document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from corefw.jsontext import JsonError, parse_json
from corefw.wire.records import MAX_LAYOUT
from corefw_machine_python import requirements
from corefw_machine_python.declarations import FieldType
from corefw_machine_python.jsonlike import GENERATOR_LIMIT, GENERATORS

RAISE_VERSION: Final = "raise `version` when the fields change, and give new ones `since`"

_VARIABLE: Final = re.compile(r"(value|section)\[([1-9][0-9]{0,9})\]\Z|rng\[([a-z]+)\]\Z")


def variable_limit(type_name: str) -> int | None:
    """Maximum bytes of a guest.value, guest.section or guest.rng in the stream; None for a field of fixed length.
    Raises ValueError for an unknown type."""
    found = _VARIABLE.match(type_name)
    if found is None:
        FieldType.parse(type_name)
        return None
    if found[1]:
        return int(found[2])
    if found[3] not in GENERATORS:
        raise ValueError(f"'{type_name}' is not a generator type")
    return GENERATOR_LIMIT


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a program, and the versions that it runs with.

    fields     name, type and since, in the order of the stream
    arrays     name -> shape and dtype, as text
    disks      name -> length in bytes, as text; empty in the document of an earlier migfw
    versions   of "python", "numpy", "migfw", and of what `requires` names
    """

    program: str
    version: int
    minimum_version: int
    fields: tuple[tuple[str, str, int], ...]
    arrays: Mapping[str, str]
    requires: Mapping[str, str]
    versions: Mapping[str, str]
    disks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: Mapping[str, Any]) -> Layout:
        """Make a layout from the guest's answer to "load"."""
        return cls(
            program=loaded["name"],
            version=loaded["version"],
            minimum_version=loaded["minimum_version"],
            fields=tuple((one["name"], one["type"], one["since"]) for one in loaded["fields"]),
            arrays={one["name"]: f"{tuple(one['shape'])} of {one['type']}" for one in loaded["arrays"]},
            requires=loaded["requires"],
            versions={name: version or "?" for name, version in loaded["versions"].items()},
            disks={one["name"]: f"{one['length']} bytes" for one in loaded["disks"]},
        )

    def pack(self) -> bytes:
        """Encode the document. Raises ValueError if the program declares too much."""
        document = {name: getattr(self, name) for name in self.__slots__}
        text = json.dumps(document, separators=(",", ":")).encode()
        if len(text) > MAX_LAYOUT:
            raise ValueError(f"its declarations take {len(text)} bytes, more than {MAX_LAYOUT}")
        return text

    @classmethod
    def unpack(cls, data: bytes) -> Layout:
        """Decode a document. Raises ValueError if it is malformed; unknown members, from a later migfw, are ignored."""
        document = {"disks": {}, **parse(data)}
        for name, kind in _KINDS.items():
            if not kind(document.get(name)):
                raise ValueError(f"{name} {document.get(name)!r:.80}")
        fields = tuple((name, type_name, since) for name, type_name, since in document["fields"])
        return cls(**{name: document[name] for name in _KINDS} | {"fields": fields})


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return type(value) is int


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, str) for inner in value.values())


def _is_fields(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and [type(one) for one in row] == [str, str, int] for row in value
    )


_KINDS: Final = {
    "program": _is_text,
    "version": _is_number,
    "minimum_version": _is_number,
    "fields": _is_fields,
    "arrays": _is_table,
    "requires": _is_table,
    "versions": _is_table,
    "disks": _is_table,
}


def parse(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for anything else."""
    try:
        document = parse_json(data)
    except JsonError:
        raise ValueError("no JSON") from None
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    return document


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison: `refusals` prevent the program from running here, `notes` may matter. Both are
    phrases."""

    refusals: tuple[str, ...]
    notes: tuple[str, ...]


def compare(here: Layout, there: Layout) -> Comparison:
    """Compare the incoming program with the one here."""
    refusals = []
    if here.program != there.program:
        refusals.append(f"the destination has program '{here.program}', the source '{there.program}'")
    if not here.minimum_version <= there.version <= here.version:
        known = " to ".join(str(one) for one in sorted({here.minimum_version, here.version}))
        refusals.append(
            f"the destination's program takes over version {known}, the source's is version {there.version}"
        )
    elif different := compare_fields(here.fields, there.fields, there.version):
        refusals.append(f"this program has different fields: {'; '.join(different)} ({RAISE_VERSION})")
    if different := _compare_tables(here.arrays, there.arrays):
        refusals.append(f"this program has different arrays: {'; '.join(different)} (give both sides the same options)")
    if different := _compare_tables(here.disks, there.disks):
        refusals.append(f"this program has different disks: {'; '.join(different)} (both sides need the same files)")
    refusals += _compare_requirements(here, there)
    return Comparison(tuple(refusals), tuple(_notes(here, there)))


def compare_fields(
    here: Sequence[tuple[str, str, int]], there: Sequence[tuple[str, str, int]], version: int
) -> list[str]:
    """Describe, as phrases, how the fields of a source of this version differ from the expected ones."""
    mine = {name: kind for name, kind, since in here if since <= version}
    theirs = {name: kind for name, kind, since in there if since <= version}
    found = _missing(mine, theirs)
    found += [
        f"'{name}' is {theirs[name]} at the source and {kind} at the destination"
        for name, kind in mine.items()
        if theirs.get(name, kind) != kind
    ]
    if not found and list(mine) != list(theirs):
        found.append(
            f"they are in a different order: {', '.join(theirs)} at the source, {', '.join(mine)} at the destination"
        )
    return found


def _compare_tables(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    found = _missing(here, there)
    return found + [
        f"'{name}' is {there[name]} at the source and {kind} at the destination"
        for name, kind in here.items()
        if there.get(name, kind) != kind
    ]


def _missing(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    found = [f"'{name}' is missing at the destination" for name in there if name not in here]
    return found + [f"'{name}' is missing at the source" for name in here if name not in there]


def _compare_requirements(here: Layout, there: Layout) -> list[str]:
    """Compare the versions that the incoming program requires with those that are installed here."""
    try:
        found = [
            f"the source's program requires {one} at the destination" for one in requirements.unmet(there.requires)
        ]
    except ValueError as error:
        return [f"the source's program has a `requires` that cannot be read: {error}"]
    for name in {**there.requires, **here.requires}:
        texts = (there.requires.get(name, ""), here.requires.get(name, ""))
        mine, theirs = here.versions.get(name) or requirements.installed(name), there.versions.get(name)
        if any(text.strip() == requirements.SAME for text in texts) and mine != theirs:
            found.append(
                f"the program requires the same {name} on both sides: {theirs} at the source, {mine} at the destination"
            )
    return found


def _notes(here: Layout, there: Layout) -> list[str]:
    found = []
    for name, called in (("python", "Python"), ("numpy", "NumPy"), ("migfw", "migfw")):
        mine, theirs = here.versions.get(name, "?"), there.versions.get(name, "?")
        if requirements.release(mine)[:2] != requirements.release(theirs)[:2]:
            also = ""
            if name == "numpy" and any(kind == "rng[numpy]" for _, kind, _ in here.fields):
                also = ": a generator keeps its state, but another NumPy may draw different numbers from it"
            found.append(f"{called} is {theirs} at the source and {mine} at the destination{also}")
    return found
