"""Files of a QEMU with the capability mapped-ram: they are inspected, parked or refused, and sent on.

The files are built here, with the devices of a recorded stream after the RAM; tests/interop has real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from corefw_machine_qemu import ParkedMachine

from corefw.engine import Engine
from corefw.inspection import inspect
from corefw.inspection.source import FileSource
from corefw.machine import MachineConfig
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.wire import items
from corefw.wire.constants import BE32, RAM_IDSTR, RAM_VERSION, RamFlag, SectionType
from corefw.wire.decoder import decode
from corefw.wire.records import (
    BlockEntry,
    Configuration,
    MappedHeader,
    SectionHeader,
    configuration_capabilities,
    configuration_subsections,
    write_block_list,
    write_configuration,
    write_footer,
    write_header,
    write_mapped_header,
    write_part_header,
    write_section_header,
)
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.golden.record import load
from tests.helpers.engines import query_migrate

PATIENCE = 60.0
PAGE = 4096
ALIGNMENT = 1 << 20
Pages = Mapping[str, tuple[int, Mapping[int, int]]]
"""Block -> (pages in all, {page: the byte that fills it})."""

GUEST: Pages = {"pc.ram": (300, {0: 1, 1: 2, 2: 3, 70: 4, 299: 5}), "rom": (3, {1: 6}), "empty": (64, {})}


def capabilities(*names: str) -> bytes:
    """The subsection of the configuration that names the capabilities."""
    head = b"\x05\x1aconfiguration/capabilities" + BE32.pack(1)
    return head + BE32.pack(len(names)) + b"".join(bytes((len(name),)) + name.encode() for name in names)


def devices() -> bytes:
    """The recorded machine's device sections, up to the end of the stream."""
    data = load("pc")
    first = next(
        item.offset
        for item in decode(StreamReader(MemorySource(data)))
        if isinstance(item, items.Section) and item.header.idstr != RAM_IDSTR
    )
    return data[first:]


def mapped(guest: Pages, *names: str, origin: int = 0) -> bytes:
    """A whole file whose stream begins at `origin`."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    writer.write(bytes(origin))
    write_header(writer)
    write_configuration(writer, Configuration("pc-i440fx-7.2", capabilities(*(names or ("mapped-ram",)))))
    write_section_header(writer, SectionHeader(SectionType.START, 2, RAM_IDSTR, 0, RAM_VERSION))
    writer.be64(sum(count for count, _ in guest.values()) * PAGE | RamFlag.MEM_SIZE)
    for name, (count, pages) in guest.items():
        write_block_list(writer, [BlockEntry(name, count * PAGE)])
        bitmap_offset = writer.position + 28
        bitmap = np.zeros(-(-count // 64) * 64, np.uint8)
        bitmap[list(pages)] = 1
        pages_offset = -(-(bitmap_offset + len(bitmap) // 8) // ALIGNMENT) * ALIGNMENT
        write_mapped_header(writer, MappedHeader(PAGE, bitmap_offset, pages_offset))
        writer.write(np.packbits(bitmap, bitorder="little").tobytes())
        writer.write(b"?" * (pages_offset - writer.position))
        for page in range(count):  # what is not in the bitmap may be anything
            writer.write(bytes((pages[page],)) * PAGE if page in pages else b"?" * PAGE)
    writer.be64(RamFlag.EOS)
    write_footer(writer, 2)
    write_part_header(writer, SectionType.END, 2)
    writer.be64(RamFlag.EOS)
    write_footer(writer, 2)
    writer.write(devices())
    writer.flush()
    return bytes(sink.data)


@contextlib.contextmanager
def parking() -> Iterator[Engine]:
    plugins = Plugins.load()
    engine = Engine(ParkedMachine(MachineConfig(incoming=True)), plugins, plugins.settings())
    try:
        yield engine
    finally:
        engine.close()


def park(engine: Engine, uri: str) -> None:
    engine.migrate_incoming(uri)
    assert engine.wait_incoming(PATIENCE) is MigrationStatus.COMPLETED, query_migrate(engine)


def check_ram(engine: Engine, guest: Pages) -> None:
    blocks = {block.idstr: block for block in engine.machine.ram_blocks()}
    assert blocks.keys() == guest.keys()
    for name, (count, pages) in guest.items():
        expected = b"".join(bytes((pages.get(page, 0),)) * PAGE for page in range(count))
        assert blocks[name].view == expected


def test_a_file_is_parked_and_sent_on_as_an_ordinary_stream(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(mapped(GUEST))
    with parking() as engine:
        park(engine, f"file:{tmp_path}/mapped")
        check_ram(engine, GUEST)
        engine.migrate(f"file:{tmp_path}/stored")
        assert engine.wait_outgoing(PATIENCE) is MigrationStatus.COMPLETED, query_migrate(engine)
    stored = (tmp_path / "stored").read_bytes()
    found = inspect(MemorySource(stored))
    assert found.complete, found.damage
    assert found.configuration is not None
    assert found.configuration == Configuration("pc-i440fx-7.2"), "nothing of mapped-ram is left"
    assert stored.endswith(devices())
    with parking() as engine:
        park(engine, f"file:{tmp_path}/stored")
        check_ram(engine, GUEST)


def test_other_capabilities_stay(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(mapped(GUEST, "something", "mapped-ram"))
    with parking() as engine:
        park(engine, f"file:{tmp_path}/mapped")
        stored = engine.machine.stored_format() if isinstance(engine.machine, ParkedMachine) else None
        assert stored is not None
        configuration = Configuration("", stored.configuration_tail)
        assert configuration_capabilities(configuration) == {"something"}
        assert list(configuration_subsections(configuration)) == ["configuration/capabilities"]


def test_a_file_with_an_offset(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(mapped(GUEST, origin=5000))
    with parking() as engine:
        park(engine, f"file:{tmp_path}/mapped,offset=5000")
        check_ram(engine, GUEST)


def test_a_file_through_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(mapped(GUEST))
    with parking() as engine:
        park(engine, f"exec:cat {tmp_path}/mapped")
        check_ram(engine, GUEST)


def test_a_block_of_many_pages(tmp_path: Path) -> None:
    """More pages than are examined at once, with runs across the borders."""
    pages = {page: page % 251 + 1 for page in (*range(32760, 32775), 65535, 65536, 66000)}
    (tmp_path / "mapped").write_bytes(mapped({"pc.ram": (66001, pages)}))
    with parking() as engine:
        park(engine, f"file:{tmp_path}/mapped")
        (block,) = engine.machine.ram_blocks()
        assert {page: int(block.pages[page][0]) for page in pages} == pages
        assert np.count_nonzero(block.pages[:, ::4095]) == 2 * len(pages)


def test_inspect_counts_the_pages(tmp_path: Path) -> None:
    data = mapped(GUEST)
    (tmp_path / "mapped").write_bytes(data)
    with FileSource.open(str(tmp_path / "mapped")) as source:
        from_file = inspect(source)
    for found in (from_file, inspect(MemorySource(data))):
        assert found.complete, found.damage or found.missing
        assert found.size == len(data)
        counted = {name: (block.pages["normal"], block.pages["zero"]) for name, block in found.blocks.items()}
        assert counted == {"pc.ram": (5, 295), "rom": (1, 2), "empty": (0, 64)}
        assert "cpu" in {section.idstr for section in found.sections}


@pytest.mark.parametrize(
    ("at", "replacement", "reason"),
    [
        (0, BE32.pack(2), "version 1 of mapped-ram, got version 2"),
        (4, (1 << 16).to_bytes(8), "pages of 4096 bytes, got 65536"),
        (12, (0).to_bytes(8), "the bitmap of a block's pages"),
        (12, ((1 << 64) - 1).to_bytes(8), "pages behind their bitmap"),
        (20, (1).to_bytes(8), "pages behind their bitmap"),
        (20, ((1 << 64) - PAGE).to_bytes(8), "of the file on, got them at"),
        (20, (1 << 40).to_bytes(8), "the end of the stream"),
        (28 + 39, b"\xff", "a bitmap of the 300 pages of 'pc.ram', got more pages"),
    ],
)
def test_a_header_that_is_wrong(at: int, replacement: bytes, reason: str, tmp_path: Path) -> None:
    data = bytearray(mapped(GUEST))
    header = data.index(b"\x06pc.ram") + 7 + 8
    data[header + at : header + at + len(replacement)] = replacement
    (tmp_path / "mapped").write_bytes(data)
    with parking() as engine:
        engine.migrate_incoming(f"file:{tmp_path}/mapped")
        assert engine.wait_incoming(PATIENCE) is MigrationStatus.FAILED
        assert reason in query_migrate(engine)["error-desc"]
        assert not engine.machine.ram_blocks()
    if at != 28 + 39:  # inspect counts pages, and does not look at which they are
        found = inspect(MemorySource(bytes(data)))
        assert found.damage is not None
        assert reason in str(found.damage)


def test_a_file_that_is_cut(tmp_path: Path) -> None:
    data = mapped({"pc.ram": (8, {1: 1, 6: 2})})
    pages = data.index(b"\1" * PAGE) - PAGE
    for end in (pages - 10, pages + PAGE + 5, pages + 6 * PAGE + 5, pages + 8 * PAGE):
        (tmp_path / "mapped").write_bytes(data[:end])
        with parking() as engine:
            engine.migrate_incoming(f"file:{tmp_path}/mapped")
            assert engine.wait_incoming(PATIENCE) is MigrationStatus.FAILED
            assert "the end of the stream" in query_migrate(engine)["error-desc"]
