"""`migfw inspect`: show what is inside a recorded stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from corefw.cli.console import ExitStatus, Finished, note, print_facts, print_json, print_table
from corefw.cli.options import json_option

if TYPE_CHECKING:
    from corefw.inspection import BitmapInfo, CommandInfo, Inspection, SectionInfo, ValueBudget

MOST_TEXT: Final = 60
"""Characters of a list that are shown."""

MOST_STRING: Final = 500
"""Characters of a string that are shown."""


class _StreamFile(click.ParamType[tuple[str, int]]):
    """Converts a path, "-", or a file: URI to (path, offset)."""

    name = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        from corefw.errors import UsageError
        from corefw.net.streamfile import split_offset

        path, offset = value, 0
        if value.startswith("file:"):
            try:
                path, offset = split_offset(value.removeprefix("file:"))
            except UsageError as error:
                self.fail(str(error), param, ctx)
        click.Path(exists=True, dir_okay=False, allow_dash=True).convert(path, param, ctx)
        return path, offset


@click.command()
@click.argument("place", metavar="FILE", type=_StreamFile())
@click.option("--device", "devices", metavar="NAME", multiple=True, help="Show the fields of this device. Repeatable.")
@click.option("--fields", "all_fields", is_flag=True, help="Show the fields of all devices.")
@json_option
def inspect(place: tuple[str, int], devices: Sequence[str], all_fields: bool, as_json: bool) -> None:
    """Show the sections, RAM, devices and commands of the migration stream in FILE ("-": standard input).

    FILE may also be a libvirt save image (virsh save), or a URI like QEMU's: file:PATH,offset=N.

    Reads streams of QEMU and migfw, with any stream options. A damaged stream is shown up to the damage. The exit
    status is 1 if the stream is damaged or its RAM is missing.

    \b
    Examples:
      migfw inspect machine.stream
      migfw inspect --device cpu --device timer machine.stream
      migfw inspect --json machine.stream | jq '.ram'
      zcat machine.stream.gz | migfw inspect -
      migfw inspect file:machine.stream,offset=64K
    """
    from corefw.inspection import ValueBudget, document
    from corefw.inspection import inspect as inspect_stream
    from corefw.inspection.source import FileSource

    file, offset = place
    with FileSource.open(file, offset) as source:
        found = inspect_stream(source)
        found.origin, found.image = source.origin, source.image
        if found.damage is not None and source.size is not None:
            found.size = source.size  # it may continue after the damage
    missing = [name for name in devices if all(section.idstr != name for section in found.sections)]
    if as_json:
        print_json(document(found))
    else:
        _print(found, None if all_fields else frozenset(devices), ValueBudget())
    if found.damage is not None:
        note(f"'{file}' is damaged: {found.damage}")
        raise Finished(ExitStatus.FAILED)
    if found.missing is not None:
        note(f"'{file}' is not a complete guest: RAM is missing: {found.missing}")
        raise Finished(ExitStatus.FAILED)
    if missing:
        note(f"'{file}' has no device '{missing[0]}' (the names are in the table of sections)")
        raise Finished(ExitStatus.FAILED)


def _print(found: Inspection, devices: frozenset[str] | None, budget: ValueBudget) -> None:
    """Print the report. `devices` are those to show the fields of; None shows all."""
    print_facts(_facts(found))
    if found.blocks:
        click.echo()
        _print_ram(found)
    if found.bitmaps:
        click.echo()
        _print_bitmaps(found)
    if found.entries:
        click.echo()
        _print_entries(found)
    for entry in found.sections:
        if devices is None or entry.idstr in devices:
            _print_fields(entry, budget)
    for command in found.commands:
        if command.package is not None:
            click.echo(f"\nInside the package at {command.offset:#x} (offsets count from its first byte):")
            _print(command.package, devices, budget)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    from corefw.quantities import format_size

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


def _print_ram(found: Inspection) -> None:
    from corefw.inspection.model import PAGE_KINDS
    from corefw.quantities import format_size

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
    _print_aligned(headings, rows, numbers=len(headings) - 1)


def _print_bitmaps(found: Inspection) -> None:
    from corefw.quantities import format_size

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
    _print_aligned(headings, rows, numbers=4)


def _marks(bitmap: BitmapInfo) -> list[str]:
    marks = {"disabled": not bitmap.enabled, "persistent": bitmap.persistent, "incomplete": not bitmap.complete}
    return [mark for mark, shown in marks.items() if shown]


def _print_entries(found: Inspection) -> None:
    from corefw.inspection import SectionInfo

    headings = ("OFFSET", "SIZE", "ID", "KIND", "VERSION", "NAME")
    rows = [_section(entry) if isinstance(entry, SectionInfo) else _command(entry) for entry in found.entries]
    _print_aligned(headings, rows, numbers=3)


def _section(entry: SectionInfo) -> tuple[str, ...]:
    kind = entry.type if entry.count == 1 else f"{entry.type} x{entry.count}"
    version = "" if entry.version_id is None else str(entry.version_id)
    instance = f" (instance {entry.instance_id})" if entry.instance_id else ""
    return (f"{entry.offset:#x}", str(entry.size), str(entry.section_id), kind, version, _text(entry.idstr) + instance)


def _command(entry: CommandInfo) -> tuple[str, ...]:
    from corefw.inspection import command_meaning, command_name

    meaning = command_meaning(entry)
    text = command_name(entry) + (f": {_text(meaning)}" if meaning else "")
    return (f"{entry.offset:#x}", str(5 + len(entry.record.payload)), "", "command", "", text)


def _print_aligned(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> None:
    """Print a table whose first `numbers` columns are right-aligned."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(numbers)]

    def aligned(row: Sequence[str]) -> list[str]:
        return [*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), *row[numbers:]]

    print_table(aligned(headings), [aligned(row) for row in rows])


def _print_fields(entry: SectionInfo, budget: ValueBudget) -> None:
    from corefw.inspection import device_fields

    if entry.body is None:
        return
    click.echo(f"\n{_text(entry.idstr)} (instance {entry.instance_id}), {len(entry.body)} bytes:")
    if entry.device is None:
        click.echo("  not decoded: the stream has no description of them")
        return
    for line in _lines(device_fields(entry.device, entry.body, budget), "  "):
        click.echo(line)


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
