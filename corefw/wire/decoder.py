"""Takes a stream of any origin apart into items: QEMU's or migfw's, with every option on or off, whole or damaged.

Invariant: it gives every item that is whole, in order, and then ends or raises RemoteStreamError with the place of the
damage. It keeps at most MAX_DEVICE_STATE bytes: ram records are passed on one by one, and what comes from the first
section on that only the description can cut is held until the stream has ended.

Source: QEMU 7.2's qemu_loadvm_state_main (migration/savevm.c); docs/stream.md tells the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from corefw.errors import RemoteStreamError, StreamError
from corefw.wire import items
from corefw.wire.constants import MAX_DESCRIPTION, MAX_PACKAGE, RAM_IDSTR, Command, RamFlag, SectionType
from corefw.wire.cutting import Cutter, find_description
from corefw.wire.description import Description, parse_description
from corefw.wire.items import Item
from corefw.wire.records import (
    LAYOUT_IDSTR,
    MAPPED_RAM,
    PAGE_BODIES,
    RamLayout,
    RamRecord,
    SectionHeader,
    configuration_capabilities,
    configuration_page_size,
    parse_postcopy_advise,
    peek_section_name,
    read_command,
    read_configuration_body,
    read_description_body,
    read_footer,
    read_header,
    read_layout,
    read_package,
    read_part_header,
    read_ram_record,
    read_section_header,
)
from corefw.wire.stream import MemorySource, StreamReader

MAX_DEVICE_STATE: Final = 64 << 20
"""Bytes of device sections and description that are held at once."""

KNOWN: Final = frozenset({RAM_IDSTR, LAYOUT_IDSTR})
"""Sections whose records are known here; all others are cut."""


@dataclass(slots=True)
class _State:
    """What earlier parts of a stream say about the later ones; shared with the streams inside."""

    layout: RamLayout = field(default_factory=RamLayout)
    sections: dict[int, SectionHeader] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    block: str | None = None
    footers: bool | None = None
    packaged: int = 0


def decode(reader: StreamReader) -> Iterator[Item]:
    """The items of a stream, header to description, as they come. Raises RemoteStreamError, ChannelError."""
    return _Decoder(reader, _State()).stream()


def decode_sections(
    data: bytes, *, base: int = 0, footers: bool | None = None, complete: bool = True
) -> Iterator[Item]:
    """The items of device sections alone, EOF and description included. `base` is the place of `data` in its stream.

    `complete`: it has to end with EOF, as all but a package does.
    """
    return _decode_held(data, _State(footers=footers), base, complete)


class _Decoder:
    """One stream, or the rest of one that is in memory (then with a cutter)."""

    def __init__(
        self, reader: StreamReader, state: _State, cutter: Cutter | None = None, *, complete: bool = True
    ) -> None:
        self._reader = reader
        self._state = state
        self._cutter = cutter
        self._complete = complete
        self._kinds: Mapping[int, Callable[[int], Iterator[Item]]] = {
            SectionType.START: self._section,
            SectionType.FULL: self._section,
            SectionType.PART: self._part,
            SectionType.END: self._part,
            SectionType.COMMAND: self._command,
        }

    def stream(self) -> Iterator[Item]:
        reader = self._reader
        reader.where = "header"
        read_header(reader)
        yield items.Header(0)
        if reader.peek(1) == bytes((SectionType.CONFIGURATION,)):
            yield self._configuration()
        yield from self.sections()

    def sections(self) -> Iterator[Item]:
        reader = self._reader
        while True:
            reader.where = "stream"
            at = reader.offset
            ahead = reader.peek(1)
            if not ahead and not self._complete:
                return
            if self._must_hold(ahead):
                yield from self._held()
                return
            kind = reader.u8("a section's type")
            if kind == SectionType.EOF:
                yield items.Eof(at)
                yield from self._after_eof()
                return
            if kind not in self._kinds:
                raise RemoteStreamError(at, "stream", "a section or a command", f"the type byte 0x{kind:02x}")
            yield from self._kinds[kind](kind)

    # -- the frame -------------------------------------------------------------------------------------------------

    def _configuration(self) -> Item:
        reader, state = self._reader, self._state
        reader.where = "configuration"
        at = reader.offset
        reader.u8("the section's type")
        configuration = read_configuration_body(reader)
        capabilities = configuration_capabilities(configuration)
        state.layout = replace(
            state.layout,
            page_size=configuration_page_size(configuration) or state.layout.page_size,
            addresses="x-ignore-shared" in capabilities,
            mapped=MAPPED_RAM in capabilities,
        )
        return items.ConfigurationItem(at, configuration)

    def _section(self, kind: int) -> Iterator[Item]:
        at = self._reader.offset - 1
        header = read_section_header(self._reader, SectionType(kind))
        yield items.Section(at, header)
        if kind == SectionType.START:
            self._state.sections[header.section_id] = header
        yield from self._body(header, kind)

    def _part(self, kind: int) -> Iterator[Item]:
        reader = self._reader
        at = reader.offset - 1
        section_id = read_part_header(reader)
        header = self._state.sections.get(section_id)
        if header is None:
            raise RemoteStreamError(at, "stream", "the id of a section that was started", str(section_id))
        yield items.Part(at, SectionType(kind), header)
        yield from self._body(header, kind)

    def _body(self, header: SectionHeader, kind: int) -> Iterator[Item]:
        reader, state = self._reader, self._state
        reader.where = f"section {header.section_id} '{header.idstr}'"
        if header.idstr == RAM_IDSTR:
            yield from self._ram()
        elif header.idstr == LAYOUT_IDSTR:
            yield from self._layout(kind)
        else:
            yield self._cut_body(header)
        at = reader.offset
        if state.footers is None:
            state.footers = reader.peek(1) == bytes((SectionType.FOOTER,))
        if state.footers:
            read_footer(reader, header.section_id, reader.where)
            yield items.Footer(at, header.section_id)

    def _layout(self, kind: int) -> Iterator[Item]:
        at = self._reader.offset
        if kind == SectionType.START:
            yield items.Layout(at, read_layout(self._reader))

    def _cut_body(self, header: SectionHeader) -> Item:
        reader, at = self._reader, self._reader.offset
        assert self._cutter is not None, "an unknown section is held first"
        measured = self._cutter.measure(header, at)
        if measured is None:
            raise reader.error("the section's end, told by a description or by its own footer", "neither")
        size, device = measured
        return items.Body(at, header, reader.read(size, "a device's state"), device)

    def _after_eof(self) -> Iterator[Item]:
        reader = self._reader
        reader.where = "description"
        at = reader.offset
        ahead = reader.peek(1)
        if ahead == bytes((SectionType.VMDESCRIPTION,)):
            reader.u8("the section's type")
            text = read_description_body(reader)
            try:
                description = parse_description(text)
            except StreamError as error:
                yield items.DescriptionItem(at, text, None)
                raise RemoteStreamError(at, "description", "JSON that describes devices", str(error)) from None
            yield items.DescriptionItem(at, text, description)
        if more := reader.peek(1):
            raise reader.error("the end of the stream", f"more bytes, the first 0x{more[0]:02x}")

    # -- the bodies of ram -----------------------------------------------------------------------------------------

    def _ram(self) -> Iterator[Item]:
        reader, state = self._reader, self._state
        while True:
            at = reader.offset
            record = read_ram_record(reader, state.layout)
            if record.kind is RamFlag.MEM_SIZE:
                if state.blocks:
                    raise RemoteStreamError(at, reader.where, "the list of RAM blocks once", "it again")
                state.blocks = {entry.idstr: entry.length for entry in record.blocks}
            about_a_page = record.kind in PAGE_BODIES
            yield items.Ram(at, record, self._block_of(record, at) if about_a_page else None)
            if record.kind is RamFlag.EOS:
                return

    def _block_of(self, record: RamRecord, at: int) -> str:
        state, where = self._state, self._reader.where
        state.block = record.idstr if record.idstr is not None else state.block
        length = state.blocks.get(state.block) if state.block is not None else None
        if state.block is None or length is None:
            raise RemoteStreamError(at, where, "a page of a RAM block that was listed", f"one of '{state.block}'")
        if record.address >= length:
            expected = f"a page within the {length} bytes of '{state.block}'"
            raise RemoteStreamError(at, where, expected, f"one at {record.address:#x}")
        return state.block

    # -- commands --------------------------------------------------------------------------------------------------

    def _command(self, _kind: int) -> Iterator[Item]:
        reader, state = self._reader, self._state
        reader.where = "command"
        at = reader.offset - 1
        record = read_command(reader)
        yield items.CommandItem(at, record)
        if record.command is Command.POSTCOPY_ADVISE and parse_postcopy_advise(record.payload):
            state.layout = replace(state.layout, page_sizes=True)
        if record.command is Command.PACKAGED:
            at = reader.offset
            if not self._complete:
                raise reader.error("no package within a package", f"command {record.command.name}")
            data = read_package(reader, record)
            state.packaged += len(data)
            if state.packaged > MAX_PACKAGE:
                raise RemoteStreamError(at, reader.where, f"packages of {MAX_PACKAGE} bytes in all", "more")
            yield _package(at, data, state)

    # -- what only the end of the stream tells apart ---------------------------------------------------------------

    def _must_hold(self, ahead: bytes) -> bool:
        if self._cutter is not None or not ahead or ahead[0] not in (SectionType.START, SectionType.FULL):
            return False
        return peek_section_name(self._reader) not in (*KNOWN, None)

    def _held(self) -> Iterator[Item]:
        reader, base = self._reader, self._reader.offset
        held = bytearray()
        while not reader.at_end():
            start, end = reader.span()
            if len(held) + end - start > MAX_DEVICE_STATE + MAX_DESCRIPTION:
                raise reader.error(f"at most {MAX_DEVICE_STATE >> 20} MiB of device state", "more")
            held += reader.buffer[start:end]
            reader.skip(end - start)
        yield from _decode_held(bytes(held), self._state, base, self._complete)


def _decode_held(data: bytes, state: _State, base: int, complete: bool) -> Iterator[Item]:
    """The items of the rest of a stream. Offsets count from the stream's beginning, in errors too."""
    description = _description_of(data)
    if description is None and state.footers is False:
        yield items.Uncut(base, data)
        if complete and data[-1:] != bytes((SectionType.EOF,)):
            raise RemoteStreamError(base + len(data), "stream", "the EOF byte", "the end of the stream")
        return
    cutter = Cutter(data, description, state.footers)
    try:
        for item in _Decoder(StreamReader(MemorySource(data)), state, cutter, complete=complete).sections():
            yield replace(item, offset=base + item.offset)
    except RemoteStreamError as error:
        raise RemoteStreamError(base + error.offset, error.where, error.expected, error.got) from None


def _description_of(data: bytes) -> Description | None:
    """The description at the end of the data, if there is one that can be used."""
    at = find_description(data)
    if at is None:
        return None
    try:
        return parse_description(data[at + 5 :])
    except StreamError:
        return None  # the decoder reads it once more where it stands, and reports what is wrong with it


def _package(at: int, data: bytes, state: _State) -> items.Package:
    inner: list[Item] = []
    try:
        inner += _decode_held(data, state, 0, complete=False)
    except StreamError as error:
        return items.Package(at, data, tuple(inner), error)
    return items.Package(at, data, tuple(inner), None)
