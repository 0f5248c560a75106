"""`migfw convert`: it changes what it should and nothing else, and reports what will not load."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from corefw.inspection import inspect
from corefw.wire import items
from corefw.wire.constants import PLUGIN_COMMANDS, Command, RamFlag, SectionType
from corefw.wire.decoder import decode
from corefw.wire.records import BlockEntry, CommandRecord, Configuration, RamRecord, SectionHeader
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.golden.record import RECORDINGS, load
from tests.helpers.cli import MIGFW, migfw

PAGE = 4096
RAM = SectionHeader(SectionType.START, 2, "ram", 0, 4)
DEVICE = SectionHeader(SectionType.FULL, 3, "0000:00:02.0/card", 0, 2)
CAPABILITIES_TAIL = b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\x05x-abc"


def encoded(stream: Iterable[items.Item]) -> bytes:
    sink = MemorySink()
    items.encode(StreamWriter(sink), stream)
    return bytes(sink.data)


def decoded(data: bytes) -> list[items.Item]:
    return list(decode(StreamReader(MemorySource(data))))


def field(name: str, size: int = 4, kind: str = "uint32", **more: object) -> dict[str, object]:
    return {"name": name, "type": kind, "size": size, **more}


def stream_of(
    *records: RamRecord,
    machine: str = "pc-i440fx-10.0",
    tail: bytes = b"",
    commands: Sequence[Command | int] = (),
    description: bytes | None = None,
    body: bytes = bytes(8),
    fields: Sequence[dict[str, object]] = (field("a"), field("b")),
    subsections: Sequence[dict[str, object]] = (),
) -> bytes:
    """A machine with two pages and one device, as QEMU would write it."""
    device = {"name": DEVICE.idstr, "instance_id": 0, "vmsd_name": "card", "version": 2, "fields": list(fields)}
    if subsections:
        device["subsections"] = list(subsections)
    text = json.dumps({"page_size": PAGE, "devices": [device]}).encode() if description is None else description
    records = records or (RamRecord(RamFlag.ZERO, 0, "pc.ram", b"\0"), RamRecord(RamFlag.ZERO, PAGE, "pc.ram", b"\0"))
    eos, footer = items.Ram(0, RamRecord(RamFlag.EOS, 0), None), items.Footer(0, 2)
    return encoded(
        [
            items.Header(0),
            items.ConfigurationItem(0, Configuration(machine, tail)),
            *(items.Section(0, RAM), items.Ram(0, _list_of(2 * PAGE), None), eos, footer),
            *(items.CommandItem(0, CommandRecord(command)) for command in commands),
            *(items.Part(0, SectionType.END, RAM), *(items.Ram(0, one, None) for one in records), eos, footer),
            *(items.Section(0, DEVICE), items.Body(0, DEVICE, body, None), items.Footer(0, 3)),
            items.Eof(0),
            items.DescriptionItem(0, text),
        ]
    )


def _list_of(length: int) -> RamRecord:
    return RamRecord(RamFlag.MEM_SIZE, length, blocks=(BlockEntry("pc.ram", length),))


class Converted:
    """A stream and the command's result: `data` is None if OUT was not created."""

    def __init__(self, folder: Path, data: bytes, *arguments: str) -> None:
        source, self.path = folder / "in", folder / "out"
        source.write_bytes(data)
        done = migfw("convert", str(source), str(self.path), *arguments, "--json")
        self.status, self.stderr = done.returncode, done.stderr
        self.report: Any = json.loads(done.stdout) if done.stdout else None
        self.data = self.path.read_bytes() if self.path.exists() else None

    @property
    def items(self) -> list[items.Item]:
        assert self.data is not None, self.stderr
        return decoded(self.data)


# -- what changes, and what does not -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_same_version_is_the_same_stream(tmp_path: Path, name: str) -> None:
    done = Converted(tmp_path, load(name), "--for", "7.2")
    assert (done.status, done.data, done.report["changes"]) == (0, load(name), [])


def test_the_same_machine_type_is_the_same_stream(tmp_path: Path) -> None:
    done = Converted(tmp_path, load("q35"), "--machine", "pc-q35-7.2")
    assert (done.status, done.data) == (0, load("q35"))


@pytest.mark.parametrize("name", ["pc", "pc-postcopy", "pc-xbzrle", "pc-no-footers", "pc-no-description", "pc-uuid"])
def test_only_the_machine_type_is_renamed(tmp_path: Path, name: str) -> None:
    before = load(name)
    done = Converted(tmp_path, before, "--machine", "pc-i440fx-8.2")
    assert done.data == before.replace(b"\0\0\0\x0dpc-i440fx-7.2", b"\0\0\0\x0dpc-i440fx-8.2", 1)
    assert done.report["machine"] == {"from": "pc-i440fx-7.2", "to": "pc-i440fx-8.2"}
    assert done.report["for"] == "8.2"
    assert done.report["changes"] == ["machine type 'pc-i440fx-7.2' renamed to 'pc-i440fx-8.2'"]


def test_a_longer_name_moves_the_rest(tmp_path: Path) -> None:
    done = Converted(tmp_path, load("pc"), "--machine", "pc-i440fx-10.0")
    before = load("pc")
    assert done.data == before[:9] + b"\0\0\0\x0epc-i440fx-10.0" + before[9 + 4 + 13 :]


@pytest.mark.parametrize("name", ["pc-no-configuration", "pc-bare"])
def test_a_configuration_is_added_where_there_is_none(tmp_path: Path, name: str) -> None:
    done = Converted(tmp_path, load(name), "--machine", "pc-i440fx-7.2")
    assert done.data == load(name)[:8] + b"\7\0\0\0\x0dpc-i440fx-7.2" + load(name)[8:]
    assert "added" in done.report["changes"][0]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (("--for", "9.2", "--machine", "pc-i440fx-9.2"), False),
        (("--machine", "pc-i440fx-7.2"), False),
        (("--machine", "pc-i440fx-7.2", "--for", "10.0"), True),
        (("--for", "10.0"), True),
        (("--for", "11.1"), True),
    ],
)
def test_switchover_start_goes_only_to_who_knows_it(tmp_path: Path, arguments: Sequence[str], kept: bool) -> None:
    data = stream_of(commands=[Command.SWITCHOVER_START])
    done = Converted(tmp_path, data, *arguments)
    commands = [item.record.command for item in done.items if isinstance(item, items.CommandItem)]
    assert commands == ([Command.SWITCHOVER_START] if kept else [])
    assert ("1 command SWITCHOVER_START left out" in done.report["changes"]) is not kept
    assert done.data is not None
    assert len(data) - len(done.data) - len("pc-i440fx-10.0") + len(done.report["machine"]["to"]) == (0 if kept else 5)


def test_a_plugins_command_goes_to_no_qemu(tmp_path: Path) -> None:
    data = stream_of(commands=[PLUGIN_COMMANDS[0], Command.SWITCHOVER_START])
    assert [entry.record.name for entry in inspect(MemorySource(data)).commands] == ["0x7000", "SWITCHOVER_START"]
    done = Converted(tmp_path, data, "--for", "10.0")
    commands = [item.record.command for item in done.items if isinstance(item, items.CommandItem)]
    assert commands == [Command.SWITCHOVER_START]
    assert "1 command 0x7000 left out" in done.report["changes"]


@pytest.mark.parametrize(("version", "kept"), [("8.0", False), ("8.1", True)])
def test_multifd_flush_goes_only_to_who_knows_it(tmp_path: Path, version: str, kept: bool) -> None:
    flush = RamRecord(RamFlag.MULTIFD_FLUSH, 0)
    data = stream_of(flush, flush, machine="pc-q35-8.0")
    done = Converted(tmp_path, data, "--for", version)
    assert sum(isinstance(item, items.Ram) and item.record == flush for item in done.items) == (2 if kept else 0)
    assert done.report["changes"] == ([] if kept else ["2 RAM record MULTIFD_FLUSH left out"])


def test_compressed_pages_are_unpacked_for_who_does_not_know_them(tmp_path: Path) -> None:
    page = bytes(range(256)) * 16
    packed = zlib.compress(page)
    body = len(packed).to_bytes(4, "big") + packed
    data = stream_of(
        RamRecord(RamFlag.COMPRESS_PAGE, 0, "pc.ram", body),
        RamRecord(RamFlag.COMPRESS_PAGE | RamFlag.CONTINUE, PAGE, None, body),
        machine="pc-q35-8.0",
    )
    assert Converted(tmp_path, data, "--for", "9.0").data == data
    (tmp_path / "out").unlink()
    done = Converted(tmp_path, data, "--for", "9.1")
    records = [item.record for item in done.items if isinstance(item, items.Ram) and item.block is not None]
    assert records == [
        RamRecord(RamFlag.PAGE, 0, "pc.ram", page),
        RamRecord(RamFlag.PAGE | RamFlag.CONTINUE, PAGE, None, page),
    ]


@pytest.mark.parametrize(
    "packed", [b"\0\0\0\4abcd", len(zlib.compress(bytes(99))).to_bytes(4, "big") + zlib.compress(bytes(99))]
)
def test_compressed_pages_that_are_none_are_damage(tmp_path: Path, packed: bytes) -> None:
    data = stream_of(RamRecord(RamFlag.COMPRESS_PAGE, 0, "pc.ram", packed), machine="pc-q35-8.0")
    done = Converted(tmp_path, data, "--for", "9.1")
    assert (done.status, done.data) == (1, None)
    assert "at offset" in done.stderr


@pytest.mark.parametrize("broken", [b'"page_size: 4096"', b'"page_size": 409\xff'])
def test_a_description_that_is_no_json_is_damage(tmp_path: Path, broken: bytes) -> None:
    data = load("pc").replace(b'"page_size": 4096', broken)
    done = Converted(tmp_path, data, "--for", "7.2")
    assert (done.status, done.data) == (1, None)
    assert "is damaged" in done.stderr and "the description is not JSON" in done.stderr


def test_subsections_that_a_version_does_not_know_are_left_out(tmp_path: Path) -> None:
    data = stream_of(tail=CAPABILITIES_TAIL, machine="pc-i440fx-3.1")
    done = Converted(tmp_path, data, "--for", "3.1")
    assert isinstance(item := done.items[1], items.ConfigurationItem)
    assert item.configuration == Configuration("pc-i440fx-3.1")
    done.path.unlink()
    done = Converted(tmp_path, data, "--for", "4.0")
    assert done.data == data
    assert "'x-abc'" in done.report["notes"][0]


@pytest.mark.parametrize("padding", [*range(16), 31_000, 31_200])
def test_the_description_tells_the_new_name(tmp_path: Path, padding: int) -> None:
    """QEMU 10.0 describes the configuration too. The rest of the JSON stays, including objects with a name twice, and
    QEMU's script still finds it."""
    configuration = {
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [field("len"), field("name", 14, "buffer")],
    }
    twice = '{"x": 1, "x": 2, "fill": "%s"}' % ("." * padding)
    device = f'{{"name": "{DEVICE.idstr}", "instance_id": 0, "fields": [{json.dumps(field("a", 8))}], "t": {twice}}}'
    text = f'{{"configuration": {json.dumps(configuration)}, "page_size": 4096, "devices": [{device}]}}'
    done = Converted(tmp_path, stream_of(description=text.encode()), "--machine", "pc-i440fx-7.2")
    assert done.data is not None
    after = next(item.text for item in done.items if isinstance(item, items.DescriptionItem))
    assert b"".join(after.split()) == "".join(text.replace('"size": 14', '"size": 13').split()).encode()
    assert done.data.index(b"{", done.data.rindex(b"\0")) == len(done.data) - len(after)


def test_a_file_of_mapped_ram_is_refused(tmp_path: Path) -> None:
    tail = CAPABILITIES_TAIL.replace(b"\x05x-abc", b"\x0amapped-ram")
    done = Converted(tmp_path, stream_of(tail=tail), "--machine", "pc-i440fx-9.2")
    assert (done.status, done.data) == (1, None)
    assert "park the machine" in done.stderr


# -- what will not load ------------------------------------------------------------------------------------------------


def test_another_board_will_not_load(tmp_path: Path) -> None:
    done = Converted(tmp_path, load("pc"), "--machine", "pc-q35-7.2")
    assert done.status == 1
    assert "different boards" in done.report["problems"][0]
    assert done.data is not None
    assert "will not load" in done.stderr


def test_a_machine_type_that_the_version_does_not_have_is_said(tmp_path: Path) -> None:
    done = Converted(tmp_path, stream_of(), "--for", "7.2")
    assert done.status == 1
    assert done.report["problems"] == ["QEMU 7.2 has no machine type 'pc-i440fx-10.0' (try --machine pc-i440fx-7.2)"]


def table(**more: Any) -> dict[str, Any]:
    """The device as in the output of -dump-vmstate."""
    fields = [
        {"field": name, "version_id": 0, "field_exists": False, "size": 4} for name in more.pop("names", ("a", "b"))
    ]
    return {"name": "card", "version_id": 2, "minimum_version_id": 1, "Fields": fields, **more}


def tables(*states: dict[str, Any]) -> bytes:
    document: dict[str, Any] = {"vmschkmachine": {"Name": "pc-i440fx-7.2"}}
    for number, state in enumerate(states):
        versions = {name: state[name] for name in ("version_id", "minimum_version_id")}
        document[f"type-{number}"] = {"Name": f"type-{number}", **versions, "Description": state}
    return json.dumps(document).encode()


SUBSECTION: dict[str, object] = {"vmsd_name": "card/x", "version": 2, "fields": [field("c")]}
SUBSECTION_BODY = bytes(8) + b"\5\6card/x\0\0\0\2" + bytes(4)
KNOWN_SUBSECTION = {"name": "card/x", "version_id": 2, "minimum_version_id": 2, "Fields": table(names=["c"])["Fields"]}


@pytest.mark.parametrize(
    ("stream", "origin", "target", "problem"),
    [
        ({}, None, table(), None),
        ({}, table(), table(version_id=3), None),
        ({}, table(), table(names=["a", "renamed"]), None),
        ({}, table(), table(version_id=1), "version 2 is too new, the target loads up to 1"),
        ({}, None, table(version_id=1), "version 2 is too new, the target loads up to 1"),
        ({}, None, table(version_id=4, minimum_version_id=3), "version 2 is too old, the target loads 3 and newer"),
        ({}, None, table(names=["a"]), "the target has no field 'b'"),
        ({}, table(), table(names=["a", "b", "c"]), "the target expects a field 'c' that the source does not have"),
        ({"fields": [field("a"), field("b", 8, "uint64")], "body": bytes(12)}, None, table(), "8 bytes, the target"),
        ({"subsections": [SUBSECTION], "body": SUBSECTION_BODY}, None, table(), "subsection 'card/x': the target does"),
        ({"subsections": [SUBSECTION], "body": SUBSECTION_BODY}, None, table(Subsections=[KNOWN_SUBSECTION]), None),
        (
            {"subsections": [SUBSECTION], "body": SUBSECTION_BODY},
            table(Subsections=[KNOWN_SUBSECTION]),
            table(Subsections=[{**KNOWN_SUBSECTION, "version_id": 1, "minimum_version_id": 1}]),
            "subsection 'card/x': version 2 is too new",
        ),
    ],
)
def test_devices_are_compared_with_the_tables(
    tmp_path: Path, stream: dict[str, Any], origin: dict[str, Any] | None, target: dict[str, Any], problem: str | None
) -> None:
    (tmp_path / "to").write_bytes(tables(target))
    arguments = ["--machine", "pc-i440fx-7.2", "--to-vmstate", str(tmp_path / "to")]
    if origin is not None:
        (tmp_path / "from").write_bytes(tables(origin))
        arguments += ["--from-vmstate", str(tmp_path / "from")]
    done = Converted(tmp_path, stream_of(**stream), *arguments)
    assert done.report["devices"]["not-judged"] == []
    if problem is None:
        assert (done.status, done.report["problems"]) == (0, [])
    else:
        assert done.status == 1
        (said,) = done.report["problems"]
        assert problem in said
        assert DEVICE.idstr in said


def test_a_device_that_only_the_source_has_is_in_doubt(tmp_path: Path) -> None:
    """QEMU 7.2 loads the state of its IDE controller, although its tables do not show it."""
    (tmp_path / "from").write_bytes(tables(table()))
    (tmp_path / "to").write_bytes(tables(table(name="other")))
    both = ("--to-vmstate", str(tmp_path / "to"), "--from-vmstate", str(tmp_path / "from"))
    done = Converted(tmp_path, stream_of(), "--machine", "pc-i440fx-7.2", *both)
    assert (done.status, done.report["problems"]) == (0, [])
    assert DEVICE.idstr in done.report["doubts"][0]


def test_of_types_that_share_a_name_the_best_counts(tmp_path: Path) -> None:
    (tmp_path / "to").write_bytes(tables(table(names=["z"]), table()))
    done = Converted(tmp_path, stream_of(), "--machine", "pc-i440fx-7.2", "--to-vmstate", str(tmp_path / "to"))
    assert done.report["problems"] == []


def test_a_device_that_is_in_no_table_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "to").write_bytes(tables())
    done = Converted(tmp_path, stream_of(), "--machine", "pc-i440fx-7.2", "--to-vmstate", str(tmp_path / "to"))
    assert (done.status, done.report["devices"]) == (0, {"compared": 0, "not-judged": [DEVICE.idstr]})


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"vmschkmachine": {"Name": 1}}', b"[" * 100_000, tables({**table(), "Fields": 1})]
)
def test_tables_that_are_none_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "to").write_bytes(text)
    done = Converted(tmp_path, stream_of(), "--machine", "pc-i440fx-7.2", "--to-vmstate", str(tmp_path / "to"))
    assert (done.status, done.data) == (1, None)
    assert "-dump-vmstate" in done.stderr
    assert done.stderr.count("\n") == 1


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_is_private(tmp_path: Path) -> None:
    done = Converted(tmp_path, load("pc"), "--for", "7.2")
    assert stat.S_IMODE(done.path.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("end", [3, 100, 30_000])
def test_damage_makes_no_file(tmp_path: Path, end: int) -> None:
    done = Converted(tmp_path, load("pc")[:end], "--for", "7.2")
    assert (done.status, done.report) == (1, None)
    assert "is damaged" in done.stderr
    assert "at offset" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    done = Converted(tmp_path, load("pc"), "--for", "7.2")
    assert (done.status, done.data) == (2, b"old")
    assert "--force" in done.stderr
    done = Converted(tmp_path, load("pc"), "--for", "7.2", "--force")
    assert (done.status, done.data) == (0, load("pc"))


def test_damage_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    done = Converted(tmp_path, load("pc")[:30_000], "--for", "7.2", "--force")
    assert (done.status, done.data) == (1, b"old")


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "out").symlink_to(other)
    assert Converted(tmp_path, load("pc"), "--for", "7.2").status == 2
    done = Converted(tmp_path, load("pc"), "--for", "7.2", "--force")
    assert (done.status, done.data) == (0, load("pc"))
    assert not done.path.is_symlink()
    assert other.read_text() == "precious"


@pytest.mark.parametrize("link", ["hard", "symbolic", "none"])
def test_the_input_is_never_overwritten(tmp_path: Path, link: str) -> None:
    source, other = tmp_path / "in", tmp_path / "out"
    source.write_bytes(load("pc"))
    if link == "hard":
        other.hardlink_to(source)
    elif link == "symbolic":
        other.symlink_to(source)
    else:
        other = source
    done = migfw("convert", str(source), str(other), "--for", "7.2", "--force")
    assert done.returncode == 2
    assert "is also the input" in done.stderr
    assert source.read_bytes() == load("pc")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "nothing to convert"),
        (("--for", "seven"), "'seven' is not a QEMU version"),
        (("--for", "7"), "'7' is not a QEMU version"),
        (("--machine", ""), "is not a machine type"),
        (("--machine", "x" * 256), "is not a machine type"),
        (("--for", "7.2", "--from-vmstate", "/dev/null"), "--from-vmstate needs --to-vmstate"),
        (("--for", "7.2", "--to-vmstate", "/no/such/file"), "does not exist"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, arguments: Sequence[str], complaint: str) -> None:
    done = Converted(tmp_path, load("pc"), *arguments)
    assert (done.status, done.data) == (2, None)
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_report_is_lines(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(stream_of(commands=[Command.SWITCHOVER_START]))
    done = migfw("convert", str(source), str(tmp_path / "out"), "--machine", "pc-i440fx-7.2")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "machine: pc-i440fx-7.2" in lines
    assert "changed: 1 command SWITCHOVER_START left out" in lines
    assert any(line.startswith("devices: not compared") and "--to-vmstate" in line for line in lines)


# -- large streams -----------------------------------------------------------------------------------------------------


def _large(pages: int) -> Iterable[bytes]:
    """A stream of that many pages, in chunks of a thousand."""
    yield encoded(
        [
            items.Header(0),
            items.ConfigurationItem(0, Configuration("pc-i440fx-10.0")),
            *(items.Section(0, RAM), items.Ram(0, _list_of(pages * PAGE), None)),
            items.Ram(0, RamRecord(RamFlag.EOS, 0), None),
            *(items.Footer(0, 2), items.Part(0, SectionType.END, RAM)),
        ]
    )
    content = bytes(range(256)) * 16
    for first in range(0, pages, 1000):
        last = min(first + 1000, pages)
        yield encoded(
            items.Ram(0, RamRecord(RamFlag.PAGE, page * PAGE, "pc.ram", content), None) for page in range(first, last)
        )
    yield encoded([items.Ram(0, RamRecord(RamFlag.EOS, 0), None), items.Footer(0, 2), items.Eof(0)])


@pytest.mark.timeout(300)
def test_memory_does_not_grow_with_the_ram(tmp_path: Path) -> None:
    pages = 75_000
    program = (
        "import pathlib, re, sys\n"
        "from corefw.cli import main\n"
        "sys.argv = ['migfw', 'convert', '-', sys.argv[1], '--machine', 'pc-i440fx-7.2']\n"
        "status = main()\n"
        # Not ru_maxrss: that is at least what the test's own process had when it forked.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]\n"
        "print(peak, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        for chunk in _large(pages):
            process.stdin.write(chunk)
        process.stdin.close()
        assert process.stderr is not None
        kilobytes = int(process.stderr.read().split()[-1])
        assert process.wait() == 0
    assert out.stat().st_size > pages * PAGE
    assert kilobytes < 200 << 10


def test_progress_is_shown_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*MIGFW, "convert", "-", str(tmp_path / "out"), "--machine", "pc-i440fx-7.2", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(ours, False)
        seen = b""
        for number, chunk in enumerate(_large(20_000)):
            process.stdin.write(chunk)
            process.stdin.flush()
            if number:
                process.stdin.flush()
                seen += _available(ours)
                if b"migfw: read" not in seen:
                    subprocess.run(["sleep", "0.1"], check=True)
        process.stdin.close()
        assert json.loads(process.stdout.read())["machine"]["to"] == "pc-i440fx-7.2"
        assert process.wait() == 0
    seen += _available(ours)
    os.close(ours)
    assert b"migfw: read" in seen
    assert seen.endswith(b"\r\x1b[K"), "the line is cleared in the end"


def _available(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:  # nothing yet, or the other side was closed
        return b""


def test_a_conversion_is_a_stream_that_inspect_reads(tmp_path: Path) -> None:
    done = Converted(tmp_path, stream_of(commands=[Command.SWITCHOVER_START]), "--machine", "pc-i440fx-7.2")
    assert done.data is not None
    found = inspect(MemorySource(done.data))
    assert found.complete
    assert found.configuration == Configuration("pc-i440fx-7.2")
