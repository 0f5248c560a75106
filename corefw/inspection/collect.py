"""Read a stream to its end or to the damage, and count sections and pages.

Invariant: memory does not grow with the number of pages, and everything else that a hostile file could enlarge has a
limit (MAX_LISTED, MAX_TRACKED, the decoder's own). Whatever the bytes are, only errors of the source are raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from corefw.errors import RemoteStreamError
from corefw.inspection.model import BitmapInfo, BlockInfo, CommandInfo, Inspection, SectionInfo
from corefw.wire import items
from corefw.wire.constants import RAM_IDSTR, TARGET_PAGE_SIZE, RamFlag, SectionType
from corefw.wire.decoder import decode
from corefw.wire.items import Item
from corefw.wire.records import (
    SECTOR,
    BitmapFlag,
    BlockEntry,
    SectionHeader,
    StartFlag,
    configuration_capabilities,
    configuration_page_size,
)
from corefw.wire.stream import Source, StreamReader

MAX_LISTED: Final = 100_000
"""Maximum sections and commands to list one by one."""
MAX_TRACKED: Final = 1 << 40
"""Bytes of RAM in all blocks together up to which repeated pages are counted, which takes a bit per page."""


def inspect(source: Source) -> Inspection:
    """Inspect the whole stream. Raises ChannelError if the source fails."""
    reader = StreamReader(source)
    collector = _Collector()
    try:
        collector.take(decode(reader))
        collector.inspection.missing = collector.missing_ram()
        collector.inspection.complete = collector.inspection.missing is None
    except RemoteStreamError as damage:
        collector.inspection.damage = damage
    collector.end(reader.offset)
    if collector.inspection.damage is not None:
        collector.inspection.size = reader.received
    return collector.inspection


class _Collector:
    def __init__(self) -> None:
        self.inspection = Inspection()
        self._bitmaps: dict[tuple[str, str], BitmapInfo] = {}
        self._open: SectionInfo | None = None
        self._open_at = 0
        self._page: tuple[BlockInfo, int] | None = None
        self._seen: dict[str, bytearray] = {}
        self._ram_kinds: set[SectionType] = set()
        self._ram_listed = False
        self._kinds: Mapping[type[Item], Callable[[Any], None]] = {
            items.Header: lambda _: None,
            items.ConfigurationItem: self._configuration,
            items.Section: self._section,
            items.Part: self._part,
            items.Ram: self._ram,
            items.Bitmap: self._bitmap,
            items.Layout: lambda _: None,
            items.Body: self._body,
            items.Footer: self._footer,
            items.CommandItem: self._command,
            items.Package: self._package,
            items.Eof: lambda item: self._close(item.offset),
            items.DescriptionItem: self._description,
            items.Uncut: self._uncut,
        }

    def take(self, stream: Iterable[Item]) -> None:
        for item in stream:
            self._close_page(item.offset)
            self._kinds[type(item)](item)

    def end(self, offset: int) -> None:
        self.inspection.size = offset
        self._close(offset)

    def missing_ram(self) -> str | None:
        """The RAM that an otherwise complete stream lacks, as a phrase; None if a guest can be made of it.

        Every source lists its blocks, even if there are none, and sends each page at least once. A section with an END
        may lack pages (free-page-hint, memory that is not plugged), and blocks that the destination shares. A section
        without END is complete once all pages have come: background-snapshot sends no END.
        """
        if not self._ram_kinds:
            return "there is no section 'ram'"
        if not self._ram_listed:
            return "the section 'ram' has no list of RAM blocks"
        configuration, blocks = self.inspection.configuration, self.inspection.blocks
        if configuration is not None and "x-ignore-shared" in configuration_capabilities(configuration):
            return None
        if SectionType.END in self._ram_kinds:
            nothing = any(block.absent for block in blocks.values()) and not any(
                block.sent for block in blocks.values()
            )
            return "the section 'ram' has no pages (multifd sends them on other channels)" if nothing else None
        for name, block in blocks.items():
            if block.absent:
                return f"the section 'ram' has no end, and {block.absent} pages of '{name}' never came"
        return None

    # -- sections --------------------------------------------------------------------------------------------------

    def _configuration(self, item: items.ConfigurationItem) -> None:
        self.inspection.configuration = item.configuration
        self.inspection.page_size = configuration_page_size(item.configuration) or TARGET_PAGE_SIZE

    def _section(self, item: items.Section) -> None:
        self._close(item.offset)
        header = item.header
        kind = header.type.name.lower()
        self._note_ram(header, header.type)
        self._list(
            SectionInfo(item.offset, kind, header.section_id, header.idstr, header.instance_id, header.version_id)
        )

    def _part(self, item: items.Part) -> None:
        before = self._open
        self._close(item.offset)
        header, kind = item.header, item.type.name.lower()
        self._note_ram(header, item.type)
        if before is not None and (before.type, before.section_id) == (kind, header.section_id):
            before.count += 1
            self._open, self._open_at = before, item.offset
            return
        self._list(SectionInfo(item.offset, kind, header.section_id, header.idstr, header.instance_id, None))

    def _note_ram(self, header: SectionHeader, kind: SectionType) -> None:
        if header.idstr == RAM_IDSTR:
            self._ram_kinds.add(kind)

    def _list(self, entry: SectionInfo) -> None:
        self._open, self._open_at = entry, entry.offset
        self._add(entry)

    def _add(self, entry: SectionInfo | CommandInfo) -> None:
        if len(self.inspection.entries) < MAX_LISTED:
            self.inspection.entries.append(entry)
        else:
            self.inspection.omitted += 1

    def _close(self, offset: int) -> None:
        self._close_page(offset)
        if self._open is not None:
            self._open.size += offset - self._open_at
            if self.inspection.footers is None:
                self.inspection.footers = False
        self._open = None

    def _body(self, item: items.Body) -> None:
        assert self._open is not None
        self._open.body, self._open.device = item.data, item.device

    def _footer(self, _item: items.Footer) -> None:
        self.inspection.footers = True

    def _description(self, item: items.DescriptionItem) -> None:
        self.inspection.description = len(item.text)

    def _uncut(self, item: items.Uncut) -> None:
        self._close(item.offset)
        self.inspection.uncut = (item.offset, len(item.data))

    # -- commands --------------------------------------------------------------------------------------------------

    def _command(self, item: items.CommandItem) -> None:
        self._close(item.offset)
        self._add(CommandInfo(item.offset, item.record))

    def _package(self, item: items.Package) -> None:
        inner = _Collector()
        inner.take(item.items)
        inner.end(len(item.data))
        inner.inspection.complete = item.error is None
        if isinstance(item.error, RemoteStreamError):
            inner.inspection.damage = item.error
        entry = self.inspection.entries[-1] if not self.inspection.omitted else None
        if isinstance(entry, CommandInfo):
            entry.package = inner.inspection

    # -- dirty bitmaps ---------------------------------------------------------------------------------------------

    def _bitmap(self, item: items.Bitmap) -> None:
        record = item.record
        if item.node is None or item.bitmap is None:
            return
        key = item.node, item.bitmap
        if record.kind is BitmapFlag.START and key not in self._bitmaps and len(self._bitmaps) < MAX_LISTED:
            flags = record.start_flags
            self._bitmaps[key] = BitmapInfo(
                *key, record.granularity, StartFlag.ENABLED in flags, StartFlag.PERSISTENT in flags
            )
            self.inspection.bitmaps.append(self._bitmaps[key])
        if (info := self._bitmaps.get(key)) is None:
            return
        if record.kind is BitmapFlag.BITS:
            info.length = max(info.length, (record.sector + record.sectors) * SECTOR)
            info.dirty += int.from_bytes(record.data or b"").bit_count() * info.granularity
        info.complete |= record.kind is BitmapFlag.COMPLETE

    # -- pages -----------------------------------------------------------------------------------------------------

    def _ram(self, item: items.Ram) -> None:
        record = item.record
        if record.kind is RamFlag.MEM_SIZE:
            self._ram_listed = True
            self._list_blocks(record.blocks)
        if item.block is None:
            return
        block = self.inspection.blocks[item.block]
        self._page = block, item.offset
        kind = _PAGE_KINDS[record.kind]
        block.pages["filled" if kind == "zero" and record.body != b"\0" else kind] += 1
        if block.again is not None:
            block.again += self._is_again(item.block, record.address // self.inspection.page_size)

    def _list_blocks(self, blocks: Sequence[BlockEntry]) -> None:
        tracked = sum(entry.length for entry in blocks) <= MAX_TRACKED
        for entry in blocks:
            self.inspection.blocks[entry.idstr] = BlockInfo(
                entry, -(-entry.length // self.inspection.page_size), again=0 if tracked else None
            )
            if entry.mapped is not None:
                self._count_mapped(entry, entry.mapped)
            elif tracked:
                self._seen[entry.idstr] = bytearray(entry.length // self.inspection.page_size // 8 + 1)

    def _count_mapped(self, entry: BlockEntry, present: int) -> None:
        """Count the pages of a mapped-ram file, in which missing pages are zero."""
        block = self.inspection.blocks[entry.idstr]
        block.pages["normal"] = present
        block.pages["zero"] = block.total - present
        block.bytes = present * self.inspection.page_size
        block.again = 0

    def _is_again(self, block: str, page: int) -> bool:
        seen = self._seen[block]
        at, bit = divmod(page, 8)
        before = bool(seen[at] >> bit & 1)
        seen[at] |= 1 << bit
        return before

    def _close_page(self, offset: int) -> None:
        """Count the bytes of a page's record, which ends where the next item begins."""
        if self._page is not None:
            block, began = self._page
            block.bytes += offset - began
        self._page = None


_PAGE_KINDS: Final[Mapping[RamFlag, str]] = {
    RamFlag.PAGE: "normal",
    RamFlag.ZERO: "zero",
    RamFlag.COMPRESS_PAGE: "compressed",
    RamFlag.XBZRLE: "xbzrle",
}
