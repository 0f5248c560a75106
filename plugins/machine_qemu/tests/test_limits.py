"""Limits on a stream: they are checked before anything is allocated, and a failed load leaves nothing allocated."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from corefw_machine_qemu import ParkedMachine

from corefw.engine import Engine
from corefw.machine import MachineConfig, RunState
from corefw.memory import host
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.wire.constants import RAM_IDSTR, RAM_VERSION, RamFlag, SectionType
from corefw.wire.records import (
    BlockEntry,
    Configuration,
    SectionHeader,
    write_block_list,
    write_configuration,
    write_header,
    write_section_header,
)
from corefw.wire.stream import MemorySink, StreamWriter
from tests.helpers.engines import query_migrate

PATIENCE = 60.0
PAGE = 4096


def stream(blocks: int, pages: int, filled: int = 0) -> bytes:
    """The start of a stream with `blocks` RAM blocks of `pages` each, cut after `filled` pages of ones in the first."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_header(writer)
    write_configuration(writer, Configuration("pc-i440fx-7.2"))
    write_section_header(writer, SectionHeader(SectionType.START, 2, RAM_IDSTR, 0, RAM_VERSION))
    writer.be64(blocks * pages * PAGE | RamFlag.MEM_SIZE)
    write_block_list(writer, [BlockEntry(f"b{number}", pages * PAGE) for number in range(blocks)])
    for page in range(filled):
        writer.be64(page * PAGE | RamFlag.ZERO | (RamFlag.CONTINUE if page else 0))
        if not page:
            writer.string("b0")
        writer.u8(0xFF)
    writer.flush()
    return bytes(sink.data)


@contextlib.contextmanager
def parking(**options: str) -> Iterator[Engine]:
    plugins = Plugins.load()
    engine = Engine(ParkedMachine(MachineConfig(options=options, incoming=True)), plugins, plugins.settings())
    try:
        yield engine
    finally:
        engine.close()


def fails(engine: Engine, path: Path, data: bytes) -> str:
    """The reason why the load of `data` failed."""
    path.write_bytes(data)
    engine.migrate_incoming(f"file:{path}")
    assert engine.wait_incoming(PATIENCE) is MigrationStatus.FAILED
    return str(query_migrate(engine)["error-desc"])


def memfds() -> list[str]:
    return [name for one in Path("/proc/self/fd").iterdir() if "memfd:b" in (name := _target(one))]


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return str(link.readlink())
    return ""


def shared_memory() -> int:
    """Bytes of shared memory that this process has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssShmem:"))) << 10


def test_a_failed_load_keeps_no_descriptors(tmp_path: Path) -> None:
    with parking() as engine:
        assert "the end of the stream" in fails(engine, tmp_path / "stream", stream(blocks=200, pages=1))
        assert memfds() == []
        assert engine.machine.run_state is RunState.INMIGRATE
        assert engine.machine.information()["ram"] == {}
        # And it waits for the next one.
        assert "the end of the stream" in fails(engine, tmp_path / "again", stream(blocks=3, pages=1))


def test_a_failed_load_keeps_no_memory(tmp_path: Path) -> None:
    before = shared_memory()
    with parking() as engine:
        fails(engine, tmp_path / "stream", stream(blocks=1, pages=16384, filled=16384))
        assert shared_memory() - before < 8 << 20, "64 MiB were filled, and are free again"


def test_more_blocks_than_descriptors_are_refused_before_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_block(*_: object) -> None:
        raise AssertionError("a block was made")

    monkeypatch.setattr("corefw_machine_qemu.parked.MemfdBlock", no_block)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with parking() as engine:
            error = fails(engine, tmp_path / "stream", stream(blocks=4096, pages=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "cannot make 4096 RAM blocks: more than the" in error
    assert "--opt block-limit=N" in error


def test_the_block_limit_can_be_set(tmp_path: Path) -> None:
    with parking(**{"block-limit": "2"}) as engine:
        error = fails(engine, tmp_path / "stream", stream(blocks=3, pages=1))
        assert "cannot make 3 RAM blocks: more than the 2 allowed" in error


def test_more_ram_than_the_host_has_free_is_refused(tmp_path: Path) -> None:
    with parking() as engine:
        error = fails(engine, tmp_path / "stream", stream(blocks=1, pages=1 << 30))
    assert "cannot make 4.0 TiB of RAM: more than the" in error
    assert "that this host has free (raise it with --opt ram-limit=SIZE)" in error
    with parking(**{"ram-limit": "5T"}) as engine:
        error = fails(engine, tmp_path / "stream", stream(blocks=1, pages=1 << 30))
    assert "the end of the stream" in error, "it may be raised, as long as the pages are not there"


# -- what the host can spare -------------------------------------------------------------------------------------------


def test_spare_memory_is_what_the_kernel_says() -> None:
    assert 0 < host.spare_memory() < 1 << 50


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/box\n", {"box/memory.max": "max\n", "box/memory.current": "7\n"}, 3 << 20),
        ("0::/box\n", {"box/memory.max": "900\n", "box/memory.current": "700\n"}, 200),
        (
            "0::/a/b\n",
            {"a/memory.max": "500\n", "a/memory.current": "450\n", "a/memory.stat": "anon 1\ninactive_file 30\n"},
            80,
        ),
        ("0::/box\n", {"box/memory.max": "500\n", "box/memory.current": "600\n"}, 0),
        (
            "2:cpu:/x\n4:memory:/job\n",
            {"memory/job/memory.limit_in_bytes": "100\n", "memory/job/memory.usage_in_bytes": "40\n"},
            60,
        ),
    ],
)
def test_spare_memory_keeps_to_the_cgroup(
    membership: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    3072 kB\n")
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "SELF_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "fs")
    assert host.spare_memory() == expected
