"""The result of an inspection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from corefw.errors import RemoteStreamError
from corefw.net.streamfile import SaveImage
from corefw.wire.description import DeviceDescription
from corefw.wire.records import BlockEntry, CommandRecord, Configuration


@dataclass(slots=True)
class SectionInfo:
    """A section, or several PARTs of one section in a row.

    offset   of its type byte; size: bytes including header and footer
    body     a device's state, byte for byte; None for ram
    device   its shape, if the description has it
    """

    offset: int
    type: str
    section_id: int
    idstr: str
    instance_id: int
    version_id: int | None
    size: int = 0
    count: int = 1
    body: bytes | None = None
    device: DeviceDescription | None = None


@dataclass(slots=True)
class CommandInfo:
    """A command between sections; `package` is the stream within it."""

    offset: int
    record: CommandRecord
    package: Inspection | None = None


PAGE_KINDS: Final = ("normal", "zero", "filled", "compressed", "xbzrle")
"""How a page was sent: as bytes; as the fill byte zero; as another fill byte; compressed; as a difference."""


@dataclass(slots=True)
class BlockInfo:
    """A RAM block and its pages in the stream, in pages of the target.

    total   how many pages the block has
    pages   how many were sent, by kind
    again   how many of those had been sent before; None if that was not counted
    bytes   on the wire, including the headers of the records
    """

    entry: BlockEntry
    total: int
    pages: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PAGE_KINDS, 0))
    again: int | None = 0
    bytes: int = 0

    @property
    def sent(self) -> int:
        """Pages in the stream, counting repetitions."""
        return sum(self.pages.values())

    @property
    def absent(self) -> int:
        """Pages of the block that are not in the stream; a lower bound if `again` was not counted."""
        return max(self.total - self.sent + (self.again or 0), 0)


@dataclass(slots=True)
class BitmapInfo:
    """A dirty bitmap of a block node, sizes in bytes.

    granularity, enabled, persistent   from its START
    length     of the node, as far as the bits in the stream reach
    dirty      bytes that the bits in the stream mark as dirty
    complete   the stream has all of it
    """

    node: str
    name: str
    granularity: int
    enabled: bool
    persistent: bool
    length: int = 0
    dirty: int = 0
    complete: bool = False


@dataclass(slots=True)
class Inspection:
    """A stream, as far as it could be read.

    size       bytes of the stream, including those after damage
    footers    whether sections end with footers; None if there is no section
    complete   the stream ended as it should, with all RAM
    damage     the place where it breaks off or is wrong
    missing    what an undamaged stream lacks to make a guest, as a phrase about RAM
    uncut      device sections that cannot be told apart: (offset, size)
    origin     where in its file the stream begins; image: the libvirt save image that it is in
    omitted    number of sections and commands after the first MAX_LISTED
    """

    size: int = 0
    page_size: int = 4096
    configuration: Configuration | None = None
    footers: bool | None = None
    description: int | None = None
    entries: list[SectionInfo | CommandInfo] = field(default_factory=list)
    blocks: dict[str, BlockInfo] = field(default_factory=dict)
    bitmaps: list[BitmapInfo] = field(default_factory=list)
    uncut: tuple[int, int] | None = None
    origin: int = 0
    image: SaveImage | None = None
    omitted: int = 0
    complete: bool = False
    damage: RemoteStreamError | None = None
    missing: str | None = None

    @property
    def sections(self) -> list[SectionInfo]:
        return [entry for entry in self.entries if isinstance(entry, SectionInfo)]

    @property
    def commands(self) -> list[CommandInfo]:
        return [entry for entry in self.entries if isinstance(entry, CommandInfo)]
