"""An inspection as one JSON document: what `migfw inspect --json` prints.

Offsets and sizes are in bytes, names are those in the stream. What the stream does not have is null or left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from corefw.errors import StreamError
from corefw.inspection.fields import ValueBudget, device_fields
from corefw.inspection.model import BitmapInfo, BlockInfo, CommandInfo, Inspection, SectionInfo
from corefw.net.streamfile import SaveImage
from corefw.wire.constants import BE32, Command
from corefw.wire.records import (
    Configuration,
    configuration_subsections,
    parse_discard,
    parse_ping,
    parse_postcopy_advise,
)


def document(inspection: Inspection, budget: ValueBudget | None = None) -> dict[str, object]:
    """The inspection as JSON values. `budget` limits how many fields are decoded, including those in packages."""
    budget = budget or ValueBudget()
    return {
        "complete": inspection.complete,
        "missing": inspection.missing,
        "size": inspection.size,
        "origin": inspection.origin,
        "save-image": None if inspection.image is None else _image(inspection.image),
        "configuration": None if inspection.configuration is None else _configuration(inspection.configuration),
        "footers": inspection.footers,
        "description": inspection.description,
        "page-size": inspection.page_size,
        "ram": {name: _block(block) for name, block in inspection.blocks.items()},
        "bitmaps": [_bitmap(bitmap) for bitmap in inspection.bitmaps],
        "sections": [_section(entry, budget) for entry in inspection.sections],
        "commands": [_command(entry, budget) for entry in inspection.commands],
        "omitted": inspection.omitted,
        "uncut": None if inspection.uncut is None else dict(zip(("offset", "size"), inspection.uncut, strict=True)),
        "damage": _damage(inspection),
    }


def _image(image: SaveImage) -> dict[str, object]:
    return {"format": image.format, "was-running": image.was_running}


def _configuration(configuration: Configuration) -> dict[str, object]:
    return {"machine": configuration.name, "subsections": list(configuration_subsections(configuration))}


def _block(block: BlockInfo) -> dict[str, object]:
    entry = block.entry
    extra = {"page-size": entry.page_size, "address": entry.address}
    return {
        "length": entry.length,
        **{name: value for name, value in extra.items() if value is not None},
        "pages": dict(block.pages),
        "duplicates": block.again,
        "absent": block.absent,
        "bytes": block.bytes,
    }


def _bitmap(bitmap: BitmapInfo) -> dict[str, object]:
    return {
        "node": bitmap.node,
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "enabled": bitmap.enabled,
        "persistent": bitmap.persistent,
        "length": bitmap.length,
        "dirty": bitmap.dirty,
        "complete": bitmap.complete,
    }


def _section(entry: SectionInfo, budget: ValueBudget) -> dict[str, object]:
    shown: dict[str, object] = {
        "offset": entry.offset,
        "type": entry.type,
        "count": entry.count,
        "id": entry.section_id,
        "name": entry.idstr,
        "instance": entry.instance_id,
        "version": entry.version_id,
        "size": entry.size,
    }
    if entry.body is not None:
        shown["body"] = len(entry.body)
    if entry.body is not None and entry.device is not None:
        shown["fields"] = device_fields(entry.device, entry.body, budget)
    return shown


def _command(entry: CommandInfo, budget: ValueBudget) -> dict[str, object]:
    shown: dict[str, object] = {
        "offset": entry.offset,
        "command": command_name(entry),
        "payload": entry.record.payload.hex(),
    }
    if (meaning := command_meaning(entry)) is not None:
        shown["meaning"] = meaning
    if entry.package is not None:
        shown["package"] = document(entry.package, budget)
    return shown


def _damage(inspection: Inspection) -> dict[str, object] | None:
    damage = inspection.damage
    if damage is None:
        return None
    return {"offset": damage.offset, "where": damage.where, "expected": damage.expected, "got": damage.got}


# -- commands ----------------------------------------------------------------------------------------------------------


def command_name(entry: CommandInfo) -> str:
    """As in QEMU's documentation, in lower case: "open-return-path". The number of a plugin's command: "0x7000"."""
    return entry.record.name.lower().replace("_", "-")


def command_meaning(entry: CommandInfo) -> str | None:
    """Describe the payload in words."""
    read = _MEANINGS.get(entry.record.command)
    return read(entry.record.payload) if read is not None else None


def _advise(payload: bytes) -> str:
    advice = parse_postcopy_advise(payload)
    if advice is None:
        return "dirty bitmaps only"
    return f"host pages {advice.page_sizes:#x}, target pages {advice.target_page_size:#x}"


def _discard(payload: bytes) -> str:
    try:
        discard = parse_discard(payload)
    except StreamError:
        return "not as it has to be"
    total = sum(length for _, length in discard.ranges)
    return f"{len(discard.ranges)} runs, {total} bytes of '{discard.block}'"


_MEANINGS: Final[Mapping[int, Callable[[bytes], str]]] = {
    Command.PING: lambda payload: f"{parse_ping(payload)}",
    Command.POSTCOPY_ADVISE: _advise,
    Command.POSTCOPY_RAM_DISCARD: _discard,
    Command.PACKAGED: lambda payload: f"{BE32.unpack(payload)[0]} bytes",
    Command.RECV_BITMAP: lambda payload: f"'{payload[1:].decode(errors='replace')}'",
}
