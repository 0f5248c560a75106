"""What is known about a stream that was inspected."""

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

    offset   of its type byte; size: bytes with head and footer
    body     a device's state as it came, None for ram
    device   its shape, where the description tells it
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
"""How a page was sent: whole; as the fill byte zero; as another fill byte; compressed; as a difference."""


@dataclass(slots=True)
class BlockInfo:
    """A RAM block and its pages in the stream, in pages of the target.

    total   how many the block has
    pages   by kind
    again   of all these, those that had been sent before; None where nobody counted
    bytes   on the wire, the records' heads included
    """

    entry: BlockEntry
    total: int
    pages: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PAGE_KINDS, 0))
    again: int | None = 0
    bytes: int = 0

    @property
    def sent(self) -> int:
        """Pages in the stream, each as often as it came."""
        return sum(self.pages.values())

    @property
    def absent(self) -> int:
        """Pages of the block that never came; where nobody counted those that came again, at least so many."""
        return max(self.total - self.sent + (self.again or 0), 0)


@dataclass(slots=True)
class Inspection:
    """A stream, as far as it could be read.

    size       bytes of the stream; of a damaged one, those that came from its source, the damage's and later ones too
    footers    whether sections have them; None where no section came
    complete   it ended as streams do, with all RAM
    damage     where it breaks off or is wrong
    missing    what a whole stream lacks to make a guest: RAM, in words
    uncut      bytes of device sections that nothing tells apart: (offset, size)
    origin     where in its file the stream begins; image: the libvirt save image that it is in
    omitted    sections and commands beyond the first MAX_LISTED, which are counted only
    """

    size: int = 0
    page_size: int = 4096
    configuration: Configuration | None = None
    footers: bool | None = None
    description: int | None = None
    entries: list[SectionInfo | CommandInfo] = field(default_factory=list)
    blocks: dict[str, BlockInfo] = field(default_factory=dict)
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
