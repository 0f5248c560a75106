"""What a program consists of, as a document; and how two of them differ.

The source sends its layout, the destination compares it with its own: two fields of one size in another order would
load as each other. The same document tells `migfw check` whether a migration could succeed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from corefw_machine_python.declarations import FieldType
from corefw_machine_python.jsonlike import GENERATOR_LIMIT, GENERATORS

MAX_LAYOUT: Final = 1 << 20
"""Bytes of a layout in the stream."""

RAISE_VERSION: Final = "raise `version` when the fields change, and give new ones `since`"

_VARIABLE: Final = re.compile(r"(value)\[([1-9][0-9]{0,9})\]\Z|rng\[([a-z]+)\]\Z")


def variable_limit(type_name: str) -> int | None:
    """The most bytes that a guest.value or guest.rng has in the stream; None for a field of fixed length. Raises
    ValueError for what is neither."""
    found = _VARIABLE.match(type_name)
    if found is None:
        FieldType.parse(type_name)
        return None
    if found[1]:
        return int(found[2])
    if found[3] not in GENERATORS:
        raise ValueError(f"'{type_name}' is no type of generator")
    return GENERATOR_LIMIT


def pack_fields(version: int, fields: Sequence[Mapping[str, Any]]) -> bytes:
    """Names, types and `since` of the fields, as the stream has them in front of their values."""
    rows = [[one["name"], one["type"], one["since"]] for one in fields]
    return json.dumps({"version": version, "fields": rows}, separators=(",", ":")).encode()


def unpack_fields(data: bytes) -> tuple[int, list[dict[str, Any]]]:
    """The version, and the fields. Raises ValueError."""
    document = parse(data)
    version, rows = document.get("version"), document.get("fields")
    if type(version) is not int or not isinstance(rows, list):
        raise ValueError("no list of fields")
    for row in rows:
        if not (isinstance(row, list) and [type(one) for one in row] == [str, str, int]):
            raise ValueError("a field that is not [name, type, since]")
    return version, [{"name": row[0], "type": row[1], "since": row[2]} for row in rows]


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else."""
    try:
        document = json.loads(data.decode())
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError("no JSON") from None
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    return document


def compare_fields(here: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]], version: int) -> list[str]:
    """What is different, as phrases, between the fields of a source of this version and those that it should have."""
    mine = {one["name"]: one["type"] for one in here if one["since"] <= version}
    theirs = {one["name"]: one["type"] for one in there if one["since"] <= version}
    found = [f"'{name}' is missing here" for name in theirs if name not in mine]
    found += [f"'{name}' is missing there" for name in mine if name not in theirs]
    found += [
        f"'{name}' is {theirs[name]} there and {kind} here"
        for name, kind in mine.items()
        if theirs.get(name, kind) != kind
    ]
    if not found and list(mine) != list(theirs):
        found.append(f"they are in another order: {', '.join(theirs)} there, {', '.join(mine)} here")
    return found
