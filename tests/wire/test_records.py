"""Each record is written and read; whole streams of a real QEMU are parsed and written again to the same bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.errors import RemoteStreamError, StreamError
from corefw.wire import items
from corefw.wire.constants import BE32, PLUGIN_COMMANDS, Command, RamFlag, ReturnMessage, SectionType
from corefw.wire.cutting import find_description
from corefw.wire.decoder import decode, decode_sections
from corefw.wire.records import (
    BlockEntry,
    CommandRecord,
    Configuration,
    MappedHeader,
    PostcopyAdvice,
    RamLayout,
    RamRecord,
    SectionHeader,
    configuration_capabilities,
    configuration_page_size,
    configuration_subsections,
    parse_ping,
    parse_postcopy_advise,
    peek_section_header,
    ping_payload,
    postcopy_advise_payload,
    read_bitmap,
    read_block_list,
    read_command,
    read_configuration_body,
    read_description_body,
    read_footer,
    read_header,
    read_mapped_header,
    read_package,
    read_part_header,
    read_ram_record,
    read_section_header,
    without_capabilities,
    write_block_list,
    write_command,
    write_configuration,
    write_description,
    write_footer,
    write_header,
    write_mapped_header,
    write_package,
    write_part_header,
    write_ram_record,
    write_section_header,
)
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.golden.record import RECORDINGS, load

UUID_TAIL = b"\x05\x12configuration/uuid\0\0\0\1" + bytes(range(16))
BITS_TAIL = b"\x05\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x0e"
CAPABILITIES_TAIL = b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\2\x0fx-ignore-shared\x03abc"
CPU = SectionHeader(SectionType.FULL, 5, "cpu", 1, 12)
PAGE = bytes(range(256)) * 16
BLOCKS = (BlockEntry("pc.ram", 1 << 20), BlockEntry("pc.rom", 1 << 17))


def reading(data: bytes) -> StreamReader:
    return StreamReader(MemorySource(data))


def written(write: Callable[[StreamWriter], None]) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    write(writer)
    writer.flush()
    return bytes(sink.data)


def fails(data: bytes, read: Callable[[StreamReader], object], expected: str) -> None:
    with pytest.raises(RemoteStreamError, match=expected):
        read(reading(data))


# -- golden bytes ------------------------------------------------------------------------------------------------------


def read_configuration(reader: StreamReader) -> Configuration:
    assert reader.u8("type") == SectionType.CONFIGURATION
    return read_configuration_body(reader)


def read_section(reader: StreamReader) -> SectionHeader:
    return read_section_header(reader, SectionType(reader.u8("type")))


def read_whole_command(reader: StreamReader) -> CommandRecord:
    assert reader.u8("type") == SectionType.COMMAND
    return read_command(reader)


PAIRS: list[tuple[bytes, Callable[[StreamWriter], None], Callable[[StreamReader], object], object]] = [
    (b"QEVM\0\0\0\3", write_header, read_header, None),
    (
        b"\7\0\0\0\2pc" + UUID_TAIL,
        lambda writer: write_configuration(writer, Configuration("pc", UUID_TAIL)),
        read_configuration,
        Configuration("pc", UUID_TAIL),
    ),
    (
        b"\4\0\0\0\5\3cpu\0\0\0\1\0\0\0\x0c",
        lambda writer: write_section_header(writer, CPU),
        read_section,
        CPU,
    ),
    (
        b"\2\0\0\0\5",
        lambda writer: write_part_header(writer, SectionType.PART, 5),
        lambda reader: (reader.u8("type"), read_part_header(reader)),
        (2, 5),
    ),
    (b"\x7e\0\0\0\5", lambda writer: write_footer(writer, 5), lambda reader: read_footer(reader, 5, "it"), None),
    (
        b"\x08\0\2\0\4\0\0\0\7",
        lambda writer: write_command(writer, Command.PING, ping_payload(7)),
        read_whole_command,
        CommandRecord(Command.PING, b"\0\0\0\7"),
    ),
    (
        b"\x08\x70\x05\0\3abc",
        lambda writer: write_command(writer, PLUGIN_COMMANDS[5], b"abc"),
        read_whole_command,
        CommandRecord(0x7005, b"abc"),
    ),
    (
        b"\x08\0\7\0\4\0\0\0\3abc",
        lambda writer: write_package(writer, b"abc"),
        lambda reader: read_package(reader, read_whole_command(reader)),
        b"abc",
    ),
    (
        b"\6\0\0\0\2{}",
        lambda writer: write_description(writer, {}),
        lambda reader: (reader.u8("type"), read_description_body(reader)),
        (6, b"{}"),
    ),
    (
        b"\6pc.ram\0\0\0\0\0\x10\0\0\6pc.rom\0\0\0\0\0\2\0\0",
        lambda writer: write_block_list(writer, BLOCKS),
        lambda reader: tuple(read_block_list(reader, (1 << 20) + (1 << 17))),
        BLOCKS,
    ),
    (
        b"\0\0\0\0\0\0\x10\x08\6pc.ram" + PAGE,
        lambda writer: write_ram_record(writer, RamRecord(RamFlag.PAGE, 4096, "pc.ram", PAGE)),
        lambda reader: read_ram_record(reader, RamLayout()),
        RamRecord(RamFlag.PAGE, 4096, "pc.ram", PAGE),
    ),
    (
        b"\0\0\0\0\0\0\x20\x22\0",
        lambda writer: write_ram_record(writer, RamRecord(RamFlag.ZERO | RamFlag.CONTINUE, 8192, None, b"\0")),
        lambda reader: read_ram_record(reader, RamLayout()),
        RamRecord(RamFlag.ZERO | RamFlag.CONTINUE, 8192, None, b"\0"),
    ),
    (
        b"\0\0\0\0\0\0\x20\x60\1\0\3xyz",
        lambda writer: write_ram_record(writer, RamRecord(RamFlag.XBZRLE | RamFlag.CONTINUE, 8192, None, b"\1\0\3xyz")),
        lambda reader: read_ram_record(reader, RamLayout()),
        RamRecord(RamFlag.XBZRLE | RamFlag.CONTINUE, 8192, None, b"\1\0\3xyz"),
    ),
]


@pytest.mark.parametrize(("data", "write", "read", "record"), PAIRS)
def test_a_record_is_written_and_read(
    data: bytes, write: Callable[[StreamWriter], None], read: Callable[[StreamReader], object], record: object
) -> None:
    assert written(write) == data
    reader = reading(data)
    assert read(reader) == record
    assert reader.at_end()


@pytest.mark.parametrize(("data", "write", "read", "record"), PAIRS)
def test_a_record_cut_short_is_an_error(
    data: bytes, write: Callable[[StreamWriter], None], read: Callable[[StreamReader], object], record: object
) -> None:
    whole = len(b"\7\0\0\0\2pc")  # a configuration without its subsections is one, too
    for length in range(len(data)):
        if not (data[0] == SectionType.CONFIGURATION and length == whole):
            with pytest.raises(RemoteStreamError):
                read(reading(data[:length]))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_the_header_says_what_came_instead() -> None:
    fails(b"QEVM\0\0\0\2", read_header, "obsolete")
    fails(b"QEVM\0\0\0\4", read_header, "expected version 3, got version 4")
    fails(b"GET / HTTP", read_header, "got bytes 47 45 54 20")
    fails(b"LibvirtQemudSave", read_header, "a libvirt save image. give its path as file:PATH")


def test_configuration_subsections() -> None:
    tail = BITS_TAIL + CAPABILITIES_TAIL + UUID_TAIL
    configuration = read_configuration(reading(b"\7\0\0\0\2pc" + tail + b"\1"))
    assert configuration.tail == tail
    assert configuration_page_size(configuration) == 1 << 14
    assert configuration_capabilities(configuration) == {"x-ignore-shared", "abc"}
    assert configuration_subsections(configuration)["configuration/uuid"] == bytes(range(16))
    assert configuration_page_size(Configuration("pc")) is None
    assert configuration_capabilities(Configuration("pc")) == frozenset()


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b"\x05\x03xyz\0\0\0\1", "configuration subsection that is known"),
        (UUID_TAIL + UUID_TAIL, "each configuration subsection once"),
        (BITS_TAIL[:-1] + b"\x1e", "target pages of 10 to 16 bits"),
        (CAPABILITIES_TAIL[:32] + b"\xff" * 4, "at most 64 capabilities"),
    ],
)
def test_a_configuration_subsection_is_refused(tail: bytes, expected: str) -> None:
    fails(b"\7\0\0\0\2pc" + tail, read_configuration, expected)


def test_a_configuration_name_has_a_limit() -> None:
    fails(b"\7\xff\xff\xff\xff", read_configuration, "at most 255 bytes")
    fails(b"\7\0\0\0\2\xff\xff", read_configuration, "as text")
    with pytest.raises(StreamError, match="longer than 255"):
        written(lambda writer: write_configuration(writer, Configuration("x" * 256)))


def test_a_footer_proves_the_section() -> None:
    fails(
        b"\x7e\0\0\0\6",
        lambda reader: read_footer(reader, 5, "section 'cpu'"),
        "'cpu': expected the footer of section 5",
    )
    fails(b"\x04\0\0\0\5", lambda reader: read_footer(reader, 5, "section 'cpu'"), "got 0x04")


def test_the_next_section_can_be_seen_ahead() -> None:
    data = written(lambda writer: write_section_header(writer, CPU))
    reader = reading(data)
    assert peek_section_header(reader) == (CPU.idstr, CPU.instance_id)
    assert reader.offset == 0
    assert peek_section_header(reading(data[:8])) is None
    assert peek_section_header(reading(data[:3])) is None


def test_commands_have_their_lengths() -> None:
    fails(b"\x08\0\2\0\3abc", read_whole_command, "4 bytes of payload for command PING, got 3")
    fails(b"\x08\0\3\0\4abcd", read_whole_command, "0 or 16 bytes of payload for command POSTCOPY_ADVISE")
    fails(b"\x08\0\x0c\0\0", read_whole_command, "a command from 1 to 11, got command 12")
    assert parse_ping(ping_payload(1 << 31)) == 1 << 31
    for advice in (None, PostcopyAdvice(4096 | 2 << 20, 4096)):
        assert parse_postcopy_advise(postcopy_advise_payload(advice)) == advice


def test_a_package_has_a_limit() -> None:
    record = CommandRecord(Command.PACKAGED, BE32.pack(0xFFFFFFFF))
    fails(b"", lambda reader: read_package(reader, record), "at most 67108864 bytes of a package")


def test_block_lists_with_page_sizes_and_addresses() -> None:
    entries = [BlockEntry("huge", 4 << 20, 2 << 20, 0x1000), BlockEntry("small", 4096, None, 0)]
    data = written(lambda writer: write_block_list(writer, entries)) + b"\0\0\0\0\0\0\0\x10"
    assert list(read_block_list(reading(data), (4 << 20) + 4096, page_sizes=True, addresses=True)) == entries
    data = written(lambda writer: write_block_list(writer, [BlockEntry("last", 4096)])) + b"\0\0\0\0\0\0\0\x10"
    assert list(read_block_list(reading(data), 4096, page_sizes=True)) == [BlockEntry("last", 4096)]


def test_a_block_list_adds_up() -> None:
    data = written(lambda writer: write_block_list(writer, BLOCKS))
    fails(data, lambda reader: list(read_block_list(reader, (1 << 20) + 1)), "RAM blocks of 1048577 bytes in all")
    fails(data * 2, lambda reader: list(read_block_list(reader, 1 << 40)), "each RAM block once, got 'pc.ram' again")
    empty = b"".join(b"\4%04x" % number + bytes(8) for number in range(4097))
    fails(empty, lambda reader: list(read_block_list(reader, 1)), "at most 4096 RAM blocks")


@pytest.mark.parametrize(
    "flags", [0, RamFlag.FULL, RamFlag.HOOK, RamFlag.PAGE | RamFlag.ZERO, RamFlag.EOS | RamFlag.CONTINUE]
)
def test_a_ram_record_of_another_kind_is_refused(flags: int) -> None:
    fails(flags.to_bytes(8, "big"), lambda reader: read_ram_record(reader, RamLayout()), "flags")


def test_compressed_pages_have_a_limit() -> None:
    head = b"\0\0\0\0\0\0\x01\x20"
    fails(
        head + b"\0\1\0\0",
        lambda reader: read_ram_record(reader, RamLayout()),
        "at most 8192 bytes of a compressed page",
    )


# -- whole streams -----------------------------------------------------------------------------------------------------


class Chunked:
    """Returns at most `size` bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._source = MemorySource(data)
        self._size = size

    def receive_into(self, view: memoryview, /) -> int:
        return self._source.receive_into(view[: self._size])


def encoded(stream: list[items.Item]) -> bytes:
    return written(lambda writer: items.encode(writer, stream))


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recorded_stream_decodes_and_encodes_to_the_same_bytes(name: str) -> None:
    data = load(name)
    stream = list(decode(reading(data)))
    assert encoded(stream) == data
    for item, after in pairwise(stream):
        assert encoded([item]) == data[item.offset : after.offset]


@pytest.mark.parametrize("size", [1, 7, 4095])
def test_chunks_make_no_difference(size: int) -> None:
    data = load("pc-postcopy")
    assert list(decode(StreamReader(Chunked(data, size)))) == list(decode(reading(data)))


@pytest.mark.parametrize("name", [name for name in RECORDINGS if "bare" not in name])
def test_every_device_is_cut(name: str) -> None:
    stream = list(decode(reading(load(name))))
    stream += [inner for item in stream if isinstance(item, items.Package) for inner in item.items]
    bodies = [item for item in stream if isinstance(item, items.Body)]
    assert {"timer", "globalstate"} <= {body.header.idstr for body in bodies}
    described = any(isinstance(item, items.DescriptionItem) for item in stream)
    assert all((body.device is not None) == described for body in bodies)


def test_footers_cut_where_the_description_does() -> None:
    sizes = {
        name: [
            (item.header.idstr, len(item.data)) for item in decode(reading(load(name))) if isinstance(item, items.Body)
        ]
        for name in ("pc", "pc-no-description", "pc-no-footers", "pc-footers-only", "pc-description-only")
    }
    assert len(set(map(tuple, sizes.values()))) == 1


def test_a_body_that_looks_like_a_footer_does_not_deceive() -> None:
    """The description decides; without one, what follows a footer has to make sense."""
    body = b"\x7e\0\0\0\5" + b"\xff" * 8
    section = written(lambda writer: write_section_header(writer, CPU)) + body + b"\x7e\0\0\0\5"
    (_, item, *_) = decode_sections(section + b"\0", footers=True)
    assert isinstance(item, items.Body)
    assert item.data == body


def test_a_wrong_description_does_not_keep_footers_from_cutting() -> None:
    data = load("pc")
    wrong = data.replace(
        b'"name": "cpu_ticks_offset", "type": "int64", "size": 8',
        b'"name": "cpu_ticks_offset", "type": "int64", "size": 9',
    )
    assert wrong != data
    bodies = [item for item in decode(reading(wrong)) if isinstance(item, items.Body)]
    assert [body.header.idstr for body in bodies if body.device is None] == ["timer"]


def test_the_description_ends_the_stream() -> None:
    data = load("pc")
    at = find_description(data)
    assert at is not None
    assert data[at - 1] == SectionType.EOF
    assert find_description(data[:-1]) is None
    assert find_description(data + b"}") is None
    assert find_description(b"") is None
    assert find_description(load("pc-no-description")) is None


# -- damage ------------------------------------------------------------------------------------------------------------


def outcome(data: bytes) -> tuple[list[items.Item], RemoteStreamError | None]:
    stream: list[items.Item] = []
    try:
        stream.extend(decode(reading(data)))
    except RemoteStreamError as error:
        return stream, error
    return stream, None


@pytest.mark.parametrize("name", ["microvm", "pc-postcopy", "pc-no-configuration", "pc-compress"])
def test_a_truncated_stream_is_an_error_with_its_offset(name: str) -> None:
    data = load(name)
    stream = list(decode(reading(data)))
    frame = [item for item in stream if not isinstance(item, items.Ram)]
    ends = {item.offset for item in frame} | {item.offset + 1 for item in frame}
    ends |= set(random.Random(1).sample(range(len(data)), 40))
    may_end = {item.offset + 1 for item in stream if isinstance(item, items.Eof)}
    for end in sorted(ends - may_end - {len(data)}):
        part, error = outcome(data[:end])
        assert error is not None, f"cut at {end}"
        assert error.offset <= end
        assert data.startswith(encoded(part)), "what came before is what was sent"


@given(st.data())
@settings(max_examples=150)
def test_a_changed_byte_is_an_error_or_content(data: st.DataObject) -> None:
    stream = bytearray(load(data.draw(st.sampled_from(["microvm", "pc-postcopy", "pc-no-footers", "pc-bare"]))))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    parts, error = outcome(bytes(stream))
    assert error is not None or encoded(parts) == bytes(stream)


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    outcome(b"QEVM\0\0\0\3" + data)
    outcome(data)


def test_a_stream_that_goes_on_after_its_end_is_an_error() -> None:
    _, error = outcome(load("pc-no-description") + b"more")
    assert error is not None


def test_the_list_of_blocks_comes_once() -> None:
    data = load("microvm")
    section = next(item for item in decode(reading(data)) if isinstance(item, items.Ram))
    record = data[section.offset : section.offset + 8] + written(
        lambda writer: write_block_list(writer, section.record.blocks)
    )
    _, error = outcome(data[: section.offset] + record + data[section.offset :])
    assert error is not None
    assert "the list of RAM blocks once" in str(error)


def test_a_block_in_a_mapped_ram_file() -> None:
    header = MappedHeader(4096, 0x65, 0x100000)
    data = written(lambda writer: write_mapped_header(writer, header))
    assert data.hex() == "00000001000000000000100000000000000000650000000000100000"
    assert read_mapped_header(reading(data), 4096, 1 << 20) == header
    assert [header.bitmap_size(pages * 4096) for pages in (0, 1, 64, 65)] == [0, 8, 8, 16]
    fails(data, lambda reader: read_mapped_header(reader, 4096, 1 << 50), "a bitmap of at most 67108864 bytes")
    bits = b"\1\0\0\0\0\0\0\x80"
    assert b"".join(read_bitmap(reading(bytes(0x65) + bits), header, 64 * 4096)) == bits


def test_capabilities_are_taken_out_of_a_configuration() -> None:
    uuid = b"\x05\x12configuration/uuid\0\0\0\1" + bytes(range(16))
    both = b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\2\x0amapped-ram\2ab"
    one = b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\2ab"
    assert without_capabilities(Configuration("pc", both + uuid), {"mapped-ram"}).tail == one + uuid
    assert without_capabilities(Configuration("pc", one + uuid), {"ab", "c"}).tail == uuid
    assert without_capabilities(Configuration("pc", uuid), {"ab"}).tail == uuid


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_every_number() -> None:
    """The tables of docs/stream.md agree with constants.py."""
    page = (Path(__file__).parents[2] / "docs" / "stream.md").read_text()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in page.splitlines() if line.startswith("|")}
    missing = [
        *((kind.name, f"0x{kind:02X}") for kind in SectionType),
        *((command.name, str(int(command))) for command in Command),
        *((flag.name, f"0x{flag:02X}") for flag in RamFlag),
        *((message.name, str(int(message))) for message in ReturnMessage),
    ]
    assert [row for row in missing if row not in rows] == []


@pytest.mark.parametrize("length", [123, 0x7A00, 0x7B00, 0x7B7B, 0x7BFF, 0x1007B])
def test_the_length_of_a_description_has_no_brace(length: int) -> None:
    """QEMU's scripts/analyze-migration.py takes the first brace after the last zero byte for the JSON's first."""
    empty = len(json.dumps({"devices": [], "x": ""}))
    data = written(lambda writer: write_description(writer, {"devices": [], "x": "." * (length - empty)}))
    assert b"{" not in data[1:5]
    assert data.index(b"{", data.rindex(b"\0")) == 5
    assert find_description(data) == 0
    assert len(data) - 5 == int.from_bytes(data[1:5], "big") >= length
    assert json.loads(data[5:])["devices"] == []
