"""The parameter block-bitmap-mapping: names of block nodes and bitmaps in the stream.

If it is not set, a node has the name of its device or else its own in the stream, and a bitmap its own. If it is set,
nodes and bitmaps have the aliases that it gives them, and those that it leaves out are not sent.

Source: QEMU 10.0, construct_alias_map (migration/block-dirty-bitmap.c) and qapi/migration.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from corefw.block import MAX_BITMAP_NAME
from corefw.declarations import Value
from corefw.settings import Settings

MAPPING: Final = "block-bitmap-mapping"
MAX_ALIAS: Final = 255
"""Maximum bytes of a name in the stream."""
MAX_NODE_NAME: Final = 31

_WELL_FORMED: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class BitmapAlias:
    """A bitmap and its alias. `persistent` replaces the bitmap's flag; None keeps it."""

    name: str
    alias: str
    persistent: bool | None = None


@dataclass(frozen=True, slots=True)
class NodeAlias:
    """A node, its alias, and those of its bitmaps that are sent or accepted."""

    node: str
    alias: str
    bitmaps: tuple[BitmapAlias, ...]


class MappingError(Exception):
    """A mapping is malformed; the message says how."""


def mapping_of(settings: Settings) -> tuple[NodeAlias, ...] | None:
    """The parameter's value; None if it is not set."""
    value = settings.parameter(MAPPING)
    return None if value is None else parse(value)


def wrong_mapping(value: Value) -> str | None:
    """What is wrong with the parameter's value, in QEMU's words; None if it is valid."""
    if value is None:
        return None
    try:
        nodes = parse(value)
    except MappingError as error:
        return str(error)
    try:
        _check_lengths(nodes)
        _check_directions(nodes)
    except MappingError as error:
        return f"Invalid mapping given for {MAPPING}: {error}"
    return None


# -- types -------------------------------------------------------------------------------------------------------------


def parse(value: Value) -> tuple[NodeAlias, ...]:
    """Parse the mapping. Raises MappingError."""
    return tuple(_node(one, path) for path, one in _entries(value, MAPPING))


def _node(value: object, path: str) -> NodeAlias:
    members = _members(value, path, "node-name", "alias", "bitmaps")
    bitmaps = _entries(members["bitmaps"], f"{path}.bitmaps")
    return NodeAlias(
        _text(members, path, "node-name"),
        _text(members, path, "alias"),
        tuple(_bitmap(one, bitmap_path) for bitmap_path, one in bitmaps),
    )


def _bitmap(value: object, path: str) -> BitmapAlias:
    members = _members(value, path, "name", "alias", optional="transform")
    inner = f"{path}.transform"
    persistent = _members(members.get("transform", {}), inner, optional="persistent").get("persistent")
    if persistent is not None and not isinstance(persistent, bool):
        raise _wrong_type(f"{inner}.persistent", "boolean")
    return BitmapAlias(_text(members, path, "name"), _text(members, path, "alias"), persistent)


def _entries(value: object, path: str) -> list[tuple[str, object]]:
    """The members of a list with their paths."""
    if not isinstance(value, list | tuple):
        raise _wrong_type(path, "array")
    return [(f"{path}[{number}]", one) for number, one in enumerate(value)]


def _members(value: object, path: str, *needed: str, optional: str = "") -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _wrong_type(path, "object")
    for key in needed:
        if key not in value:
            raise MappingError(f"Parameter '{path}.{key}' is missing")
    if unknown := [key for key in value if key not in needed and key != optional]:
        raise MappingError(f"Parameter '{path}.{unknown[0]}' is unexpected")
    return value


def _text(members: Mapping[str, object], path: str, name: str) -> str:
    value = members[name]
    if not isinstance(value, str):
        raise _wrong_type(f"{path}.{name}", "string")
    return value


def _wrong_type(path: str, expected: str) -> MappingError:
    return MappingError(f"Invalid parameter type for '{path}', expected: {expected}")


# -- what a mapping has to be in both directions -----------------------------------------------------------------------


def _check_lengths(nodes: Iterable[NodeAlias]) -> None:
    for node in nodes:
        if not _WELL_FORMED.fullmatch(node.alias):
            raise MappingError(f"The node alias '{node.alias}' is not well-formed")
        _check_length("node alias", node.alias, MAX_ALIAS)
        _check_length("node name", node.node, MAX_NODE_NAME)
        for bitmap in node.bitmaps:
            _check_length("bitmap alias", bitmap.alias, MAX_ALIAS)
            _check_length("bitmap name", bitmap.name, MAX_BITMAP_NAME)


def _check_length(what: str, name: str, limit: int) -> None:
    if len(name.encode()) > limit:
        raise MappingError(f"The {what} '{name}' is longer than {limit} bytes")


def _check_directions(nodes: Sequence[NodeAlias]) -> None:
    """Refuse a name with two aliases (for the source) and an alias with two names (for the destination)."""
    if (name := _repeated(node.node for node in nodes)) is not None:
        raise MappingError(f"The node name '{name}' is mapped twice")
    if (alias := _repeated(node.alias for node in nodes)) is not None:
        raise MappingError(f"The node alias '{alias}' is used twice")
    for node in nodes:
        if (name := _repeated(bitmap.name for bitmap in node.bitmaps)) is not None:
            raise MappingError(f"The bitmap '{node.node}'/'{name}' is mapped twice")
        if (alias := _repeated(bitmap.alias for bitmap in node.bitmaps)) is not None:
            raise MappingError(f"The bitmap alias '{node.alias}'/'{alias}' is used twice")


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs twice; None if none does."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
