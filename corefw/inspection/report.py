"""An inspection as text: the lines and tables that `migfw inspect` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from corefw.inspection.document import command_meaning, command_name
from corefw.inspection.fields import ValueBudget, device_fields
from corefw.inspection.model import PAGE_KINDS, BitmapInfo, CommandInfo, Inspection, SectionInfo
from corefw.quantities import format_size
from corefw.wire.records import COMMAND_HEADER

MOST_TEXT: Final = 60
"""Characters of a list that are shown."""

MOST_STRING: Final = 500
"""Characters of a string that are shown."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings and rows."""


def facts(found: Inspection) -> list[tuple[str, str]]:
    """General facts about the stream, as (name, value) lines."""
    configuration = found.configuration
    description = "none" if found.description is None else format_size(found.description)
    facts = [
        *_place(found),
        ("machine", configuration.name if configuration is not None else "not in the stream"),
        ("size", f"{found.size} bytes ({format_size(found.size)})"),
        ("footers", {True: "yes", False: "no", None: "unknown"}[found.footers]),
        ("description", description),
    ]
    if found.uncut is not None:
        offset, size = found.uncut
        facts.append(("devices", f"{size} bytes from {offset:#x} on, not separable without footers or a description"))
    if found.omitted:
        facts.append(("not listed", f"{found.omitted} more sections and commands"))
    if absent := sum(block.absent for block in found.blocks.values()):
        facts.append(("never sent", f"{absent} pages"))
    if found.missing is not None:
        facts.append(("missing", f"RAM: {found.missing}"))
    if found.damage is not None:
        facts.append(("damaged", f"at offset {found.damage.offset} ({found.damage.offset:#x})"))
    return [*facts, ("complete", "yes" if found.complete else "no")]


def _place(found: Inspection) -> list[tuple[str, str]]:
    """Where the stream is in its file, if not at the start."""
    if not found.origin:
        return []
    place = [("stream", f"from {found.origin:#x} of the file on; offsets below count from there")]
    if found.image is None:
        return place
    state = "running" if found.image.was_running else "paused"
    return [("save image", f"libvirt's, {found.image.format}, of a guest that was {state}"), *place]


def tables(found: Inspection) -> Iterator[Table]:
    """RAM blocks, dirty bitmaps, and sections with commands: those that the stream has."""
    if found.blocks:
        yield _ram(found)
    if found.bitmaps:
        yield _bitmaps(found)
    if found.entries:
        yield _entries(found)


def _ram(found: Inspection) -> Table:
    headings = ("LENGTH", *(kind.upper() for kind in PAGE_KINDS), "AGAIN", "BYTES SENT", "RAM BLOCK")
    rows = [
        (
            format_size(block.entry.length),
            *(str(block.pages[kind]) for kind in PAGE_KINDS),
            "?" if block.again is None else str(block.again),
            str(block.bytes),
            _text(name),
        )
        for name, block in found.blocks.items()
    ]
    return _aligned(headings, rows, numbers=len(headings) - 1)


def _bitmaps(found: Inspection) -> Table:
    headings = ("LENGTH", "DIRTY", "GRANULARITY", "BLOCK NODE", "BITMAP")
    rows = [
        (
            format_size(one.length),
            format_size(one.dirty),
            format_size(one.granularity),
            _text(one.node),
            _text(one.name) + ", ".join(["", *_marks(one)]),
        )
        for one in found.bitmaps
    ]
    return _aligned(headings, rows, numbers=4)


def _marks(bitmap: BitmapInfo) -> list[str]:
    marks = {"disabled": not bitmap.enabled, "persistent": bitmap.persistent, "incomplete": not bitmap.complete}
    return [mark for mark, shown in marks.items() if shown]


def _entries(found: Inspection) -> Table:
    headings = ("OFFSET", "SIZE", "ID", "KIND", "VERSION", "NAME")
    rows = [_section(entry) if isinstance(entry, SectionInfo) else _command(entry) for entry in found.entries]
    return _aligned(headings, rows, numbers=3)


def _section(entry: SectionInfo) -> tuple[str, ...]:
    kind = entry.type if entry.count == 1 else f"{entry.type} x{entry.count}"
    version = "" if entry.version_id is None else str(entry.version_id)
    instance = f" (instance {entry.instance_id})" if entry.instance_id else ""
    return (f"{entry.offset:#x}", str(entry.size), str(entry.section_id), kind, version, _text(entry.idstr) + instance)


def _command(entry: CommandInfo) -> tuple[str, ...]:
    meaning = command_meaning(entry)
    text = command_name(entry) + (f": {_text(meaning)}" if meaning else "")
    return (f"{entry.offset:#x}", str(COMMAND_HEADER.size + len(entry.record.payload)), "", "command", "", text)


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> Table:
    """Align the first `numbers` columns to the right."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(numbers)]

    def aligned(row: Sequence[str]) -> list[str]:
        return [*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), *row[numbers:]]

    return aligned(headings), [aligned(row) for row in rows]


def field_lines(entry: SectionInfo, budget: ValueBudget) -> Iterator[str]:
    """The fields of a device, one a line, after an empty line and a heading. Nothing if its body was not kept."""
    if entry.body is None:
        return
    yield ""
    yield f"{_text(entry.idstr)} (instance {entry.instance_id}), {len(entry.body)} bytes:"
    if entry.device is None:
        yield "  not decoded: the stream has no description of them"
        return
    yield from _lines(device_fields(entry.device, entry.body, budget), "  ")


def _lines(value: object, indent: str) -> Iterator[str]:
    """One line a field; the fields of structs are indented below it."""
    assert isinstance(value, dict)
    for name, one in value.items():
        label = f"{indent}{_text(str(name))}"
        if _is_struct(one):
            yield f"{label}:"
            yield from _lines(one, indent + "  ")
        elif isinstance(one, list) and any(_is_struct(element) for element in one):
            for number, element in enumerate(one):
                yield f"{label}[{number}]:"
                yield from _lines(element if _is_struct(element) else {"": element}, indent + "  ")
        else:
            yield f"{label} = {_shown(one)}"


def _is_struct(value: object) -> bool:
    return isinstance(value, dict) and not _is_summary(value)


def _is_summary(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "zero", "crc32"}


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"{value['bytes']} bytes, " + ("all zero" if value["zero"] else f"CRC-32 {value['crc32']}")
    if isinstance(value, list):
        text = " ".join(_shown(element) for element in value)
        return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT].rsplit(' ', 1)[0]} ... ({len(value)} in all)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value} ({value:#x})" if abs(value) > 9 else str(value)
    text = _text(str(value))
    return text if len(text) <= MOST_STRING else f"{text[:MOST_STRING]}... ({len(text)} characters)"


def _text(text: str) -> str:
    """Replace unprintable characters: names come from the stream and may contain anything."""
    return "".join(character if character.isprintable() else "?" for character in text)
