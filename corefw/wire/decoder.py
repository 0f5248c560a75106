"""Split a stream of QEMU or migfw into items, with any options, complete or damaged.

frames.py reads the frame, this module the bodies. Those of device sections do not mark their end, so everything from
the first device on is held until the stream has ended, and then split by the description or the footers (cutting.py).

Invariant: it yields every complete item in order, and then ends or raises RemoteStreamError with the place of the
damage. It holds at most MAX_DEVICE_STATE bytes; RAM records are yielded one by one.

Source: docs/stream.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from corefw.errors import RemoteStreamError, StreamError
from corefw.wire import items
from corefw.wire.constants import MAX_DESCRIPTION, MAX_PACKAGE, RAM_IDSTR, Command, RamFlag, SectionType
from corefw.wire.cutting import DESCRIPTION_HEAD, Cutter, find_description
from corefw.wire.description import Description, parse_description
from corefw.wire.frames import FrameReader
from corefw.wire.items import Item
from corefw.wire.records import (
    BITMAPS_IDSTR,
    LAYOUT_IDSTR,
    MAPPED_RAM,
    PAGE_BODIES,
    BitmapFlag,
    CommandRecord,
    Configuration,
    RamLayout,
    RamRecord,
    SectionHeader,
    configuration_capabilities,
    configuration_page_size,
    parse_postcopy_advise,
    read_bitmap_record,
    read_layout,
    read_package,
    read_ram_record,
)
from corefw.wire.stream import MemorySource, StreamReader

MAX_DEVICE_STATE: Final = 64 << 20
"""Maximum bytes of device sections to hold."""


@dataclass(slots=True)
class _State:
    """Facts from earlier parts of a stream about the bodies of later ones; shared with the packages in it."""

    layout: RamLayout = field(default_factory=RamLayout)
    blocks: dict[str, int] = field(default_factory=dict)
    block: str | None = None
    node: str | None = None
    bitmap: str | None = None
    packaged: int = 0


def decode(reader: StreamReader) -> Iterator[Item]:
    """Yield the items of a stream, from header to description. Raises RemoteStreamError, ChannelError."""
    return _Decoder(FrameReader(reader), _State()).decode()


def decode_sections(
    data: bytes, *, base: int = 0, footers: bool | None = None, package: bool = False
) -> Iterator[Item]:
    """The items of device sections alone, EOF and description included, which those of a `package` do not have. `base`
    is the offset of `data` in its stream; `footers`: whether the sections end with one, None where that is not known.
    Raises RemoteStreamError."""
    frames = FrameReader.of_sections(_reading(data, base), footers=footers)
    frames.is_package = package
    return _decode_held(data, frames, _State())


class _Decoder:
    """One stream, one package, or the rest of either that is in memory (then with a cutter)."""

    def __init__(self, frames: FrameReader, state: _State, cutter: Cutter | None = None) -> None:
        self._frames = frames
        self._reader = frames.reader
        self._begin = frames.reader.offset
        self._state = state
        self._cutter = cutter

    def decode(self) -> Iterator[Item]:
        while True:
            if self._cutter is None and self._is_device_next():
                yield from self._held()
                return
            event = self._frames.next_event()
            if event is None:
                return
            yield event
            match event:
                case items.ConfigurationItem():
                    self._note(event.configuration)
                case items.Section():
                    yield from self._body(event.header, event.header.type)
                case items.Part():
                    yield from self._body(event.header, event.type)
                case items.CommandItem():
                    yield from self._command(event.record)
                case items.DescriptionItem():
                    self._check_description(event)

    def _note(self, configuration: Configuration) -> None:
        """What the configuration section says about RAM records."""
        state, capabilities = self._state, configuration_capabilities(configuration)
        state.layout = replace(
            state.layout,
            page_size=configuration_page_size(configuration) or state.layout.page_size,
            addresses="x-ignore-shared" in capabilities,
            mapped=MAPPED_RAM in capabilities,
        )

    def _check_description(self, item: items.DescriptionItem) -> None:
        try:
            parse_description(item.text)
        except StreamError as error:
            raise RemoteStreamError(item.offset, "description", "JSON that describes devices", str(error)) from None

    # -- bodies ----------------------------------------------------------------------------------------------------

    def _body(self, header: SectionHeader, kind: SectionType) -> Iterator[Item]:
        if header.idstr in _BODIES:
            yield from _BODIES[header.idstr](self, kind)
        else:
            yield self._device(header)

    def _ram(self, _: SectionType) -> Iterator[Item]:
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

    def _bitmaps(self, _: SectionType) -> Iterator[Item]:
        reader, state = self._reader, self._state
        while True:
            at = reader.offset
            record = read_bitmap_record(reader)
            state.node = state.node if record.node is None else record.node
            state.bitmap = state.bitmap if record.bitmap is None else record.bitmap
            if record.kind is None:
                yield items.Bitmap(at, record, None, None)
            elif state.node is None or state.bitmap is None:
                raise RemoteStreamError(at, reader.where, "the name of a block node and of its bitmap", "neither")
            else:
                yield items.Bitmap(at, record, state.node, state.bitmap)
            if BitmapFlag.EOS in record.flags:
                return

    def _layout(self, kind: SectionType) -> Iterator[Item]:
        at = self._reader.offset
        if kind is SectionType.START:
            yield items.Layout(at, read_layout(self._reader))

    def _device(self, header: SectionHeader) -> Item:
        reader, at = self._reader, self._reader.offset
        measured = self._cutter.measure(header, at - self._begin) if self._cutter is not None else None
        if measured is None:
            raise reader.error("the section's end, told by a description or by its own footer", "neither")
        size, device = measured
        return items.Body(at, header, reader.read(size, "a device's state"), device)

    # -- commands --------------------------------------------------------------------------------------------------

    def _command(self, record: CommandRecord) -> Iterator[Item]:
        reader, state = self._reader, self._state
        if record.command is Command.POSTCOPY_ADVISE and parse_postcopy_advise(record.payload):
            state.layout = replace(state.layout, page_sizes=True)
        if record.command is Command.PACKAGED:
            at = reader.offset
            data = read_package(reader, record)
            state.packaged += len(data)
            if state.packaged > MAX_PACKAGE:
                raise RemoteStreamError(at, reader.where, f"packages of {MAX_PACKAGE} bytes in all", "more")
            yield self._package(at, data)

    def _package(self, at: int, data: bytes) -> items.Package:
        inner: list[Item] = []
        try:
            inner += _decode_held(data, self._frames.inside(_reading(data)), self._state)
        except StreamError as error:
            return items.Package(at, data, tuple(inner), error)
        return items.Package(at, data, tuple(inner), None)

    # -- what only the end of the stream tells apart ---------------------------------------------------------------

    def _is_device_next(self) -> bool:
        section = self._frames.peek_section()
        return section is not None and section[0] not in _BODIES

    def _held(self) -> Iterator[Item]:
        reader, base = self._reader, self._reader.offset
        held = bytearray()
        while not reader.at_end():
            start, end = reader.span()
            if len(held) + end - start > MAX_DEVICE_STATE + MAX_DESCRIPTION:
                raise reader.error(f"at most {MAX_DEVICE_STATE >> 20} MiB of device state", "more")
            held += reader.buffer[start:end]
            reader.skip(end - start)
        data = bytes(held)
        yield from _decode_held(data, self._frames.going_on_with(_reading(data, base)), self._state)


_BODIES: Final[Mapping[str, Callable[[_Decoder, SectionType], Iterator[Item]]]] = {
    RAM_IDSTR: _Decoder._ram,
    LAYOUT_IDSTR: _Decoder._layout,
    BITMAPS_IDSTR: _Decoder._bitmaps,
}
"""Sections whose bodies mark their own end. All others are devices."""


def _reading(data: bytes, base: int = 0) -> StreamReader:
    return StreamReader(MemorySource(data), base=base)


def _decode_held(data: bytes, frames: FrameReader, state: _State) -> Iterator[Item]:
    """The items of the rest of a stream; `frames` reads it from `data`."""
    description, base = _description_of(data), frames.reader.offset
    if frames.footers is False and (description is None or not description.devices):
        # A parked machine that came in postcopy has a description of no device.
        end = len(data) if description is None else find_description(data)
        yield items.Uncut(base, data[:end])
        if not frames.is_package and not data[:end].endswith(bytes((SectionType.EOF,))):
            raise RemoteStreamError(base + len(data), "stream", "the EOF byte", "the end of the stream")
        if end is not None and end < len(data):
            yield items.DescriptionItem(base + end, data[end + DESCRIPTION_HEAD :])
        return
    yield from _Decoder(frames, state, Cutter(data, description, frames.footers)).decode()


def _description_of(data: bytes) -> Description | None:
    """The description at the end of the data, if there is one that can be used."""
    at = find_description(data)
    if at is None:
        return None
    try:
        return parse_description(data[at + DESCRIPTION_HEAD :])
    except StreamError:
        return None  # the decoder reads it once more where it stands, and reports what is wrong with it
