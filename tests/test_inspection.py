"""`inspect` on streams with known contents, and on damaged ones."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest

from corefw.inspection import SUBSECTIONS, SectionInfo, device_fields, document, inspect
from corefw.inspection.fields import MAX_VALUES, NOT_DECODED
from corefw.inspection.model import Inspection
from corefw.wire import items
from corefw.wire.constants import PLUGIN_COMMANDS, RamFlag, SectionType
from corefw.wire.decoder import decode
from corefw.wire.description import DeviceDescription, FieldDescription, StateDescription
from corefw.wire.records import (
    BlockEntry,
    RamRecord,
    SectionHeader,
    write_command,
    write_description,
    write_footer,
    write_header,
    write_package,
    write_part_header,
    write_section_header,
)
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.golden.record import RECORDINGS, load
from tests.helpers.cli import MIGFW, migfw, start
from tests.helpers.qemu import wait_until

WITHOUT_FOOTERS = {"pc-no-footers", "pc-description-only", "pc-bare"}
WITHOUT_CONFIGURATION = {"pc-no-configuration", "pc-footers-only", "pc-description-only", "pc-bare"}


def inspected(name: str) -> Inspection:
    return inspect(MemorySource(load(name)))


def section(inspection: Inspection, name: str) -> SectionInfo:
    return next(entry for entry in inspection.sections if entry.idstr == name)


def fields(inspection: Inspection, name: str) -> dict[str, Any]:
    entry = section(inspection, name)
    assert entry.device is not None
    assert entry.body is not None
    return device_fields(entry.device, entry.body)


# -- what is in a stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_recording_is_complete_and_makes_a_document(name: str) -> None:
    found = inspected(name)
    assert found.complete, found.damage
    assert found.size == len(load(name))
    shown = json.loads(json.dumps(document(found)))
    assert shown["damage"] is None
    assert shown["footers"] == (name not in WITHOUT_FOOTERS)
    assert (shown["configuration"] is None) == (name in WITHOUT_CONFIGURATION)


@pytest.mark.parametrize("name", RECORDINGS)
def test_sections_and_pages_fill_the_stream(name: str) -> None:
    """The sizes add up to the size of the file."""
    found = inspected(name)
    head = 8
    if found.configuration is not None:
        head += 5 + len(found.configuration.name) + len(found.configuration.tail)
    commands = sum(5 + len(one.record.payload) + (one.package.size if one.package else 0) for one in found.commands)
    uncut = found.uncut[1] if found.uncut else 0
    tail = 1 if not uncut else 0  # the EOF byte is among what is uncut
    tail += 5 + found.description if found.description is not None else 0
    assert head + commands + sum(entry.size for entry in found.sections) + uncut + tail == found.size


def test_pages_are_counted_by_kind() -> None:
    pages = {name: inspected(name).blocks["pc.ram"] for name in ("pc", "pc-passes", "pc-compress", "pc-xbzrle")}
    assert pages["pc"].pages == {"normal": 0, "zero": 256, "filled": 0, "compressed": 0, "xbzrle": 0}
    assert pages["pc"].again == 0
    for name in ("pc-passes", "pc-xbzrle"):
        block = pages[name]
        assert block.again
        assert sum(block.pages.values()) == 256 + block.again
    assert pages["pc-compress"].pages["compressed"] >= 16
    assert pages["pc-xbzrle"].pages["xbzrle"] > 0
    assert all(block.entry == BlockEntry("pc.ram", 1 << 20) for block in pages.values())


def test_a_page_filled_with_a_byte_is_not_a_zero_page() -> None:
    found = inspect(MemorySource(_made_by_hand()))
    assert found.blocks["x"].pages["filled"] == 1
    assert found.blocks["x"].pages["normal"] == 0
    assert found.complete


def test_parts_of_one_section_are_one_line() -> None:
    found = inspected("pc-passes")
    (parts,) = [entry for entry in found.sections if entry.type == "part"]
    assert parts.count > 1
    assert [entry.type for entry in found.sections[:3]] == ["start", "part", "end"]


def test_a_live_section_of_a_plugin_and_its_command() -> None:
    """Only footers show where its bodies end, and a plugin's command follows the first of them."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_header(writer)
    write_section_header(writer, SectionHeader(SectionType.START, 1, "note", 0, 1))
    writer.be32(2)
    write_footer(writer, 1)
    write_command(writer, PLUGIN_COMMANDS[5], b"a note follows")
    for kind, body in ((SectionType.PART, b"hi"), (SectionType.END, b"")):
        write_part_header(writer, kind, 1)
        writer.write(body)
        write_footer(writer, 1)
    writer.u8(SectionType.EOF)
    writer.flush()
    found = inspect(MemorySource(bytes(sink.data)))
    assert found.damage is None
    assert [(one.type, one.size) for one in found.sections] == [("start", 27), ("part", 12), ("end", 10)]
    assert [one.record.payload for one in found.commands] == [b"a note follows"]


def test_commands_and_the_package() -> None:
    shown: Any = document(inspected("pc-postcopy"))
    names = [command["command"] for command in shown["commands"]]
    assert names[:3] == ["open-return-path", "ping", "postcopy-advise"]
    assert shown["commands"][2]["meaning"] == "host pages 0x1000, target pages 0x1000"
    assert "of 'pc.ram'" in next(
        one["meaning"] for one in shown["commands"] if one["command"] == "postcopy-ram-discard"
    )
    package = next(command["package"] for command in shown["commands"] if command["command"] == "packaged")
    assert [command["command"] for command in package["commands"]] == ["postcopy-listen", "ping", "postcopy-run"]
    assert {"cpu", "globalstate"} <= {one["name"] for one in package["sections"]}
    assert package["complete"]


def test_fields_are_decoded() -> None:
    found = inspected("pc-devices")
    cpu = fields(found, "cpu")
    assert cpu["env.eip"] == 0xFFF0
    assert len(cpu["env.regs"]) == 16
    assert cpu["env.segs"][1] == {"selector": 0xF000, "base": 0xFFFF0000, "limit": 0xFFFF, "flags": 0x9B00}
    assert fields(found, "globalstate")["runstate"] == "prelaunch"
    assert fields(found, "timer")["cpu_clock_offset"] >= 0
    assert fields(found, "mc146818rtc")["cmos_data"]["bytes"] == 128
    assert cpu[SUBSECTIONS] == {"cpu/poll_control_msr": {"env.poll_control_msr": 0}}
    assert set(fields(found, "fw_cfg")[SUBSECTIONS]) == {"fw_cfg/dma", "fw_cfg/acpi_mr"}


def test_values_of_every_type() -> None:
    shape = DeviceDescription(
        "d",
        0,
        StateDescription(
            "d",
            1,
            (
                FieldDescription("negative", "int16", 2),
                FieldDescription("checked", "uint8 equal", 1),
                FieldDescription("odd", "uint32", 3),
                FieldDescription("on", "bool", 1),
                FieldDescription("when", "timer", 8),
                FieldDescription("text", "buffer", 8),
                FieldDescription("short", "buffer", 3),
                FieldDescription("long", "buffer", 40),
                FieldDescription("many", "uint8", 1, 100),
                FieldDescription("none", "uint8", 0, 1 << 60),
                FieldDescription("unused", "unused_buffer", 1),
                FieldDescription("unused", "unused_buffer", 1),
                FieldDescription("each", "uint8", 1, index=0),
                FieldDescription("each", "uint8", 1, index=1),
            ),
            (StateDescription("d/sub", 1, (FieldDescription("x", "uint8", 1),)),),
        ),
    )
    body = (
        b"\xff\xfe\7\1\2\3\1" + b"\xff" * 8 + b"hello\0\0\0" + b"\0\1\2" + bytes(40) + bytes(range(100)) + b"\1\2\3\4"
        b"\5\5d/sub\0\0\0\1\x2a"
    )
    assert len(body) == shape.state.size
    assert device_fields(shape, body) == {
        "negative": -2,
        "checked": 7,
        "odd": "010203",
        "on": True,
        "when": -1,
        "text": "hello",
        "short": "000102",
        "long": {"bytes": 40, "zero": True, "crc32": _crc(bytes(40))},
        "many": {"bytes": 100, "zero": False, "crc32": _crc(bytes(range(100)))},
        "none": "",
        "unused": ["01", "02"],
        "each": [3, 4],
        SUBSECTIONS: {"d/sub": {"x": 42}},
    }


def _crc(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _made_by_hand() -> bytes:
    """A stream of one block with one page of 0xAA, then EOF."""
    header = SectionHeader(SectionType.START, 0, "ram", 0, 4)
    eos = items.Ram(0, RamRecord(RamFlag.EOS, 0), None)
    stream = [
        items.Header(0),
        items.Section(0, header),
        items.Ram(0, RamRecord(RamFlag.MEM_SIZE, 4096, blocks=(BlockEntry("x", 4096),)), None),
        eos,
        items.Part(0, SectionType.END, header),
        items.Ram(0, RamRecord(RamFlag.ZERO, 0, "x", b"\xaa"), "x"),
        eos,
        items.Eof(0),
    ]
    sink = MemorySink()
    items.encode(StreamWriter(sink), stream)
    return bytes(sink.data)


def _shape(*fields: FieldDescription) -> DeviceDescription:
    return DeviceDescription("d", 0, StateDescription("d", 1, fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # QEMU 7.2 numbers every element of an array of structs, 10.0 all but the last one.
        ([{"index": 0}, {"index": 1}, {"index": 2}], [1, 2, 3]),
        ([{"index": 0}, {"index": 1}, {}], [1, 2, 3]),
        # 10.0 splits arrays with null pointers.
        ([{"count": 2}, {"type": "nullptr"}], [1, 2, None]),
        ([{"type": "nullptr"}, {"count": 2}], [None, 2, 3]),
        ([{"count": 3}], [1, 2, 3]),
        ([{}, {}, {}], [1, 2, 3]),
    ],
)
def test_repeated_fields_are_one_list(fields: list[dict[str, Any]], expected: list[object]) -> None:
    described = [FieldDescription("x", one.pop("type", "uint8"), 1, **one) for one in fields]
    assert device_fields(_shape(*described), b"\1\2\3") == {"x": expected}


def test_doubles_are_numbers() -> None:
    shape = _shape(
        FieldDescription("a", "float64", 8),
        FieldDescription("b", "CPU_Double_U", 8),
        FieldDescription("c", "float64", 8, 2),
    )
    body = struct.pack(">dddd", 1.5, -0.25, math.inf, math.nan)
    assert json.loads(json.dumps(device_fields(shape, body), allow_nan=False)) == {
        "a": 1.5,
        "b": -0.25,
        "c": ["inf", "nan"],
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b'{"a":[1,2.5,null],"b":{"c":"x"}}', {"a": [1, 2.5, None], "b": {"c": "x"}}),
        (b"5", 5),
        (b"[]", []),
        (b"NaN", "NaN"),
        (b"[1,", "[1,"),
        (b"[" * 80 + b"]" * 80, "[" * 80 + "]" * 80),
        (b"[" * 9000, "[" * 9000),
    ],
)
def test_a_value_of_a_python_program_is_json(text: bytes, shown: object) -> None:
    shape = _shape(FieldDescription("x.size", "uint32", 4), FieldDescription("x", "buffer", len(text)))
    assert device_fields(shape, len(text).to_bytes(4, "big") + text) == {"x.size": len(text), "x": shown}


def test_a_python_program_is_shown(tmp_path: Path) -> None:
    """A field of each kind, as an engine stores them."""
    (tmp_path / "program.py").write_text(
        "from corefw_machine_python import guest\n"
        "class Program(guest.Program):\n"
        "    ratio = guest.field('f64', 0.375)\n"
        "    items = guest.value({'done': [1, 2], 'name': 'x'})\n"
        "    def tick(self):\n"
        "        pass\n"
    )
    engine = start("run", f"{tmp_path}/program.py:Program", "--name", "shown", runtime=tmp_path)
    try:
        stream = tmp_path / "stream"
        wait_until(lambda: migfw("status", runtime=tmp_path).returncode == 0, "the engine")
        done = migfw("migrate", f"file:{stream}", runtime=tmp_path)
        assert done.returncode == 0, done.stderr
    finally:
        engine.end()
    document = json.loads(migfw("inspect", "--json", str(stream)).stdout)
    fields = next(one["fields"] for one in document["sections"] if "ratio" in one.get("fields", {}))
    assert fields["ratio"] == 0.375
    assert fields["items"] == {"done": [1, 2], "name": "x"}


# -- streams that a guest cannot be made of ----------------------------------------------------------------------------


def _without_ram(name: str) -> bytes:
    decoded = decode(StreamReader(MemorySource(load(name))))
    kept: list[items.Item] = []
    inside = False
    for item in decoded:
        if isinstance(item, items.Section | items.Part):
            inside = item.header.idstr == "ram"
        if not inside:
            kept.append(item)
    return _encoded(kept)


def _encoded(stream: Iterable[items.Item]) -> bytes:
    sink = MemorySink()
    items.encode(StreamWriter(sink), stream)
    return bytes(sink.data)


def test_a_stream_without_ram_is_not_complete(stream: Path) -> None:
    stream.write_bytes(_without_ram("pc"))
    done = migfw("inspect", str(stream))
    assert done.returncode == 1
    assert "RAM: there is no section 'ram'" in done.stdout
    assert re.search(r"^complete:?\s+no$", done.stdout, re.MULTILINE)
    assert "RAM is missing" in done.stderr
    done = migfw("inspect", "--json", str(stream))
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["complete"], document["damage"]) == (False, None)
    assert document["missing"] == "there is no section 'ram'"


def _one_block(*records: RamRecord, end: bool, length: int = 8192) -> Inspection:
    header = SectionHeader(SectionType.START, 0, "ram", 0, 4)
    eos = items.Ram(0, RamRecord(RamFlag.EOS, 0), None)
    blocks = items.Ram(0, RamRecord(RamFlag.MEM_SIZE, length, blocks=(BlockEntry("x", length),)), None)
    part = items.Part(0, SectionType.END if end else SectionType.PART, header)
    pages = [items.Ram(0, record, None) for record in records]
    return inspect(
        MemorySource(
            _encoded([items.Header(0), items.Section(0, header), blocks, eos, part, *pages, eos, items.Eof(0)])
        )
    )


FIRST: Final = RamRecord(RamFlag.ZERO, 0, "x", b"\0")
SECOND: Final = RamRecord(RamFlag.ZERO | RamFlag.CONTINUE, 4096, None, b"\0")


def test_ram_is_missing_where_the_section_neither_ends_nor_has_all_pages() -> None:
    found = _one_block(FIRST, FIRST, end=False)
    assert not found.complete
    assert found.missing == "the section 'ram' has no end, and 1 pages of 'x' never came"


def test_ram_is_missing_where_no_page_came() -> None:
    found = _one_block(end=True)
    assert not found.complete
    assert "has no pages" in str(found.missing)


@pytest.mark.parametrize("end", [False, True])
def test_all_pages_are_all_ram(end: bool) -> None:
    """The stream of a background-snapshot has no END."""
    assert _one_block(FIRST, SECOND, end=end).complete


def test_pages_that_a_source_left_out_are_counted() -> None:
    """With free-page-hint a source does not send what the guest does not use."""
    found = _one_block(FIRST, end=True)
    assert found.complete
    assert found.blocks["x"].absent == 1


# -- streams made to hurt ----------------------------------------------------------------------------------------------


def _device_stream(fields: list[dict[str, object]], body: bytes, sections: int = 1, **more: object) -> bytes:
    """RAM, then a device described by `fields`, then its description."""
    device = {"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": fields, **more}
    ram = _made_by_hand()[:-1]
    sink = MemorySink()
    writer = StreamWriter(sink)
    writer.write(ram)
    for _ in range(sections):
        items.encode(
            writer,
            [items.Section(0, SectionHeader(SectionType.FULL, 7, "d", 0, 1)), items.Body(0, None, body, None)],  # type: ignore[arg-type]
        )
    writer.u8(SectionType.EOF)
    write_description(writer, {"page_size": 4096, "devices": [device]})
    writer.flush()
    return bytes(sink.data)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("index", [None, 0])
def test_fields_of_one_name_take_time_in_proportion(stream: Path, index: int | None) -> None:
    """If each field searched for a free name among all earlier ones, this would take hours."""
    count = 60_000
    one: dict[str, object] = {"name": "x", "type": "uint8", "size": 1} | ({} if index is None else {"index": index})
    stream.write_bytes(_device_stream([one] * count, bytes(count)))
    document = json.loads(migfw("inspect", "--json", str(stream)).stdout)
    (device,) = [section for section in document["sections"] if section["name"] == "d"]
    assert device["fields"]["x"] == [0] * count


@pytest.mark.timeout(120)
def test_a_long_name_above_many_fields_is_not_copied_for_each(stream: Path) -> None:
    count = 25_000
    inner = {"vmsd_name": "s", "version": 1, "fields": [{"name": "y", "type": "uint8", "size": 1}] * count}
    long = {"name": "x" * 2_500_000, "type": "struct", "size": count, "struct": inner}
    stream.write_bytes(_device_stream([long], bytes(count)))
    assert inspect(MemorySource(stream.read_bytes())).complete


@pytest.mark.timeout(120)
def test_fields_without_bytes_in_nested_arrays_have_a_limit() -> None:
    """With 64 x 64 x 64 elements of one byte and a thousand empty fields each, the rest is shown as bytes."""
    fields: list[dict[str, object]] = [{"name": f"{at}", "type": "uint8", "size": 0} for at in range(1000)]
    fields.append({"name": "x", "type": "uint8", "size": 1})
    size = 1
    for _ in range(3):
        inner: dict[str, object] = {"vmsd_name": "s", "version": 1, "fields": fields}
        fields = [{"name": "s", "type": "struct", "size": size, "array_len": 64, "struct": inner}]
        size *= 64
    found = inspect(MemorySource(_device_stream(fields, bytes(size))))
    assert found.complete
    text = json.dumps(document(found))
    assert len(text) < 40 * MAX_VALUES
    assert NOT_DECODED in text


def test_half_a_character_in_a_description_is_damage() -> None:
    sub = {"vmsd_name": "d/\ud800", "version": 1, "fields": []}
    found = inspect(MemorySource(_device_stream([], b"", subsections=[sub])))
    assert not found.complete
    assert found.damage is not None


@pytest.mark.timeout(120)
def test_packages_within_packages_are_refused() -> None:
    package = b""
    for _ in range(2000):
        sink = MemorySink()
        writer = StreamWriter(sink)
        write_package(writer, package)
        writer.flush()
        package = bytes(sink.data)
    found = inspect(MemorySource(load("pc")[:8] + package + b"\0"))
    (command,) = found.commands
    assert command.package is not None
    assert "within a package" in str(command.package.damage)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0, 3, 12, 100, 5000, 24000, 30000, 40000])
def test_all_up_to_the_damage_is_shown(end: int) -> None:
    whole = inspected("pc")
    found = inspect(MemorySource(load("pc")[:end]))
    assert not found.complete
    assert found.damage is not None
    assert found.damage.offset <= end
    assert found.size == end
    shown = [(entry.offset, entry.idstr) for entry in found.sections]
    assert shown == [(entry.offset, entry.idstr) for entry in whole.sections][: len(shown)]
    assert len(shown) >= len([entry for entry in whole.sections if entry.offset + entry.size <= end])
    json.dumps(document(found))


def test_a_damaged_package_is_shown_as_far_as_it_goes() -> None:
    data = bytearray(load("pc-postcopy"))
    at = data.index(b"\4\0\0\0\5\3cpu")
    data[at] = 0x33
    found = inspect(MemorySource(bytes(data)))
    (package,) = [command.package for command in found.commands if command.package is not None]
    assert package.damage is not None
    assert [entry.idstr for entry in package.sections] == ["timer", "cpu_common"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "pc.stream"
    path.write_bytes(load("pc"))
    return path


def test_the_command_prints_tables(stream: Path) -> None:
    done = migfw("inspect", str(stream), "--device", "globalstate")
    assert done.returncode == 0, done.stderr
    assert "pc-i440fx-7.2" in done.stdout
    assert "0000:00:01.0/PIIX3" in done.stdout
    assert "runstate = prelaunch" in done.stdout
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def test_the_command_prints_one_document(stream: Path) -> None:
    done = migfw("inspect", "--json", str(stream))
    assert done.returncode == 0
    assert json.loads(done.stdout)["ram"]["pc.ram"]["pages"]["zero"] == 256


def test_the_command_reads_standard_input(stream: Path) -> None:
    with stream.open("rb") as file:
        done = subprocess.run([*MIGFW, "inspect", "-", "--json"], stdin=file, capture_output=True, check=True)
    assert json.loads(done.stdout)["complete"]


def test_a_damaged_file_fails_with_its_offset(stream: Path) -> None:
    stream.write_bytes(load("pc")[:30000])
    done = migfw("inspect", str(stream))
    assert done.returncode == 1
    assert "fdc" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "is damaged" in line
    assert "at offset" in line
    done = migfw("inspect", "--json", str(stream))
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["size"], document["damage"]["offset"]) == (30000, 29462)


@pytest.mark.parametrize("piped", [False, True])
def test_the_size_is_not_where_the_damage_is(stream: Path, piped: bool) -> None:
    """A file's size is its own, even if it was not read to the end; a pipe's is the number of bytes read."""
    data = b"XXXX" + bytes(8 << 20) if not piped else load("pc")[:30000]
    stream.write_bytes(data)
    cat = subprocess.Popen(["cat", str(stream)], stdout=subprocess.PIPE)
    with cat, cat.stdout as pipe:  # type: ignore[union-attr]  # it is one
        command = [*MIGFW, "inspect", "-" if piped else str(stream)]
        done = subprocess.run(command, stdin=pipe, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    facts = dict(line.split(":", 1) for line in done.stdout.split("\n\n")[0].splitlines())
    assert facts["size"].split()[:2] == [str(len(data)), "bytes"]
    assert facts["damaged"].strip() == ("at offset 29462 (0x7316)" if piped else "at offset 0 (0x0)")


@pytest.mark.parametrize("arguments", [[], ["no-such-file"], ["/"], ["--device"], ["--what", "x"]])
def test_wrong_usage_is_one_line(arguments: list[str]) -> None:
    done = migfw("inspect", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_a_device_that_is_not_there_is_named(stream: Path) -> None:
    done = migfw("inspect", "--device", "gpu", str(stream))
    assert done.returncode == 1
    assert "has no device 'gpu'" in done.stderr


def test_names_from_the_stream_do_not_reach_the_terminal_raw(stream: Path) -> None:
    stream.write_bytes(load("pc").replace(b"\x05timer", b"\x05\x1b[2Jt"))
    assert "\x1b" not in migfw("inspect", str(stream)).stdout
