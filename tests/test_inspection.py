"""What `inspect` says of streams whose contents are known, and of damaged ones."""

from __future__ import annotations

import json
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

from corefw.inspection import SUBSECTIONS, SectionInfo, device_fields, document, inspect
from corefw.inspection.model import Inspection
from corefw.wire import items
from corefw.wire.constants import RamFlag, SectionType
from corefw.wire.description import DeviceDescription, FieldDescription, StateDescription
from corefw.wire.records import BlockEntry, RamRecord, SectionHeader
from corefw.wire.stream import MemorySink, MemorySource, StreamWriter
from tests.golden.record import RECORDINGS, load
from tests.helpers.cli import MIGFW, migfw

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
    """What is counted adds up to the size of the file."""
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
        "unused": "01",
        "unused #2": "02",
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
    """A file has its own size, whatever of it was read; of a pipe it is what came."""
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
