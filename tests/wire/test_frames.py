"""The frame of a stream, event by event, with the caller reading the bodies in between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.errors import RemoteStreamError
from corefw.wire.constants import BE32, Command, RamFlag, SectionType
from corefw.wire.frames import (
    CommandItem,
    ConfigurationItem,
    DescriptionItem,
    Eof,
    Footer,
    FrameReader,
    Header,
    Item,
    Part,
    Section,
)
from corefw.wire.records import (
    RamLayout,
    SectionHeader,
    read_package,
    read_ram_record,
    write_command,
    write_description,
    write_footer,
    write_header,
    write_package,
    write_part_header,
    write_section_header,
)
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.golden.record import load

LIVE = SectionHeader(SectionType.START, 5, "live", 0, 1)
DEVICE = SectionHeader(SectionType.FULL, 6, "device", 2, 3)
BODY = b"body"


class Chunks:
    """A source that returns its bytes in portions of `size`."""

    def __init__(self, data: bytes, size: int) -> None:
        self._source = MemorySource(data)
        self._size = size

    def receive_into(self, view: memoryview, /) -> int:
        return self._source.receive_into(view[: self._size])


def written(*, footers: bool = True, package: bytes | None = None, description: bool = True) -> bytes:
    """A stream with one live section, one device, and optionally a package in between. Every body is BODY."""
    sink = MemorySink()
    writer = StreamWriter(sink)

    def close(header: SectionHeader) -> None:
        writer.write(BODY)
        if footers:
            write_footer(writer, header.section_id)

    write_header(writer)
    write_section_header(writer, LIVE)
    close(LIVE)
    write_command(writer, Command.OPEN_RETURN_PATH)
    if package is not None:
        write_package(writer, package)
    for kind in (SectionType.PART, SectionType.END):
        write_part_header(writer, kind, LIVE.section_id)
        close(LIVE)
    write_section_header(writer, DEVICE)
    close(DEVICE)
    writer.u8(SectionType.EOF)
    if description:
        write_description(writer, {"devices": []})
    writer.flush()
    return bytes(sink.data)


def packed(*, footers: bool = True) -> bytes:
    """The inside of a package: a device and a command, without EOF."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_section_header(writer, DEVICE)
    writer.write(BODY)
    if footers:
        write_footer(writer, DEVICE.section_id)
    write_command(writer, Command.POSTCOPY_RUN)
    writer.flush()
    return bytes(sink.data)


def events(frames: FrameReader) -> Iterator[Item]:
    """Read every event, and the bodies as a caller has to."""
    while (event := frames.next_event()) is not None:
        yield event
        if isinstance(event, Section | Part):
            assert frames.reader.read(len(BODY), "a body") == BODY
        if isinstance(event, CommandItem) and event.record.command is Command.PACKAGED:
            package = read_package(frames.reader, event.record)
            yield from events(frames.inside(StreamReader(MemorySource(package))))


def kinds(data: bytes, *, footers: bool | None = None, size: int = 1 << 20) -> list[type[Item]]:
    return [type(event) for event in events(FrameReader(StreamReader(Chunks(data, size)), footers=footers))]


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_events_come_in_the_order_of_the_stream(size: int) -> None:
    live = [Section, Footer, CommandItem, Part, Footer, Part, Footer]
    assert kinds(written(), size=size) == [Header, *live, Section, Footer, Eof, DescriptionItem]
    bare = [Header, Section, CommandItem, Part, Part, Section, Eof]
    assert kinds(written(footers=False, description=False), size=size) == bare


@pytest.mark.parametrize("footers", [True, False])
def test_a_package_is_a_stream_in_the_stream(footers: bool) -> None:
    data = written(footers=footers, package=packed(footers=footers))
    found = kinds(data)
    inner = [Section, *([Footer] if footers else []), CommandItem]
    at = found.index(CommandItem) + 1
    assert found[at : at + 1 + len(inner)] == [CommandItem, *inner]
    assert found[-1] is DescriptionItem, "and the stream goes on behind it"


def test_a_package_holds_no_package() -> None:
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_package(writer, packed())
    writer.flush()
    with pytest.raises(RemoteStreamError, match="no package within a package"):
        kinds(written(package=bytes(sink.data)))


def test_sections_have_to_be_begun_and_not_ended() -> None:
    data = written()
    start = data.index(b"\x01" + BE32.pack(LIVE.section_id))
    end = data.index(b"\x03" + BE32.pack(LIVE.section_id))
    first = data[start : data.index(b"\x08", start)]
    last = data[end : data.index(b"\x04", end)]
    with pytest.raises(RemoteStreamError, match=r"a section id that is not in use, got 5 again"):
        kinds(data[: start + len(first)] + first + data[start + len(first) :])
    with pytest.raises(RemoteStreamError, match=r"the id of a section that was started, got 5"):
        kinds(data[: end + len(last)] + last + data[end + len(last) :])


@pytest.mark.parametrize(("wanted", "sent"), [(True, False), (False, True)])
def test_footers_are_where_they_have_to_be(wanted: bool, sent: bool) -> None:
    with pytest.raises(RemoteStreamError, match="footer" if wanted else "the type byte 0x7e"):
        kinds(written(footers=sent), footers=wanted)


def test_the_next_section_can_be_seen_before_it_is_read() -> None:
    frames = FrameReader(StreamReader(MemorySource(written(footers=False))))
    assert frames.peek_section() is None
    assert isinstance(frames.next_event(), Header)
    assert frames.peek_section() == ("live", 0)
    assert isinstance(frames.next_event(), Section)
    frames.reader.read(len(BODY), "a body")
    assert frames.peek_section() is None, "a command comes next"


@pytest.mark.parametrize("name", ["pc", "pc-no-footers", "pc-no-configuration", "microvm"])
def test_the_beginning_of_a_real_stream(name: str) -> None:
    """QEMU's own bytes, up to the list of RAM blocks."""
    frames = FrameReader(StreamReader(MemorySource(load(name))))
    found = [frames.next_event()]
    while not isinstance(found[-1], Section):
        found.append(frames.next_event())
    assert isinstance(found[0], Header)
    assert [type(event) for event in found[1:-1]] == ([] if "no-configuration" in name else [ConfigurationItem])
    assert found[-1].header.idstr == "ram"
    while read_ram_record(frames.reader, RamLayout()).kind is not RamFlag.EOS:
        pass
    assert isinstance(frames.next_event(), Part if "no-footers" in name else Footer)


@given(cut=st.integers(0), tail=st.binary(max_size=40))
def test_arbitrary_bytes_are_read_or_refused(cut: int, tail: bytes) -> None:
    data = written()
    data = data[: cut % (len(data) + 1)] + tail
    reader = StreamReader(MemorySource(data))
    frames = FrameReader(reader)
    try:
        while (event := frames.next_event()) is not None:
            if isinstance(event, Section | Part):
                reader.read(len(BODY), "a body")
            elif isinstance(event, CommandItem) and event.record.command is Command.PACKAGED:
                read_package(reader, event.record)
    except RemoteStreamError as error:
        assert error.offset <= len(data)
    else:
        assert reader.offset == len(data)
