"""The file plugin: the contract kit, what a hostile stream may do, and files that move with a guest."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import migfw_file
import numpy as np
import pytest
from migfw_file.changing import CHUNK
from migfw_file.loader import FileLoader
from migfw_file.saver import FileSaver

from corefw.channel import Interrupt
from corefw.engine import Engine
from corefw.errors import MachineError, StreamError
from corefw.plugins import Plugins
from corefw.settings import Settings
from corefw.states import MigrationStatus
from corefw.testing.recording import KitContext
from corefw.testing.section import CHECKS, SectionCase, check_section
from corefw.testing.tasks import wait_until
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.helpers.engines import Pair, arrived, ended, query_migrate, runs_on

LIMIT = 8 << 20
SIZE = 1 << 20


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("size", [0, 100, 2 * CHUNK, 3 * CHUNK + 5])
def test_contract(check: str, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, destination = Path(folder, "source"), Path(folder, "destination")

        def saver() -> FileSaver:
            source.write_bytes(noise(size))
            return FileSaver(str(source))

        def change(_saver: FileSaver) -> None:
            """Write to the file, in the middle and at the end."""
            with source.open("r+b") as file:
                file.seek(size // 2)
                file.write(b"changed")
                file.seek(0, os.SEEK_END)
                file.write(b"more")

        def state(section: FileSaver | FileLoader) -> bytes:
            path = source if isinstance(section, FileSaver) else section.partial
            return path.read_bytes() if path is not None else b""

        case = SectionCase(
            saver=saver,
            loader=lambda: FileLoader(str(destination), LIMIT),
            state=state,
            change=change,
            budget=1,
            samples=60,
            memory=LIMIT,
        )
        assert check_section(case, only=[check]) == [check]
        source.unlink(missing_ok=True)
        destination.unlink(missing_ok=True)
        assert list(Path(folder).iterdir()) == [], "nothing is left but the file in its place"


def load(loader: FileLoader, body: bytes) -> None:
    loader.load(StreamReader(MemorySource(body + b"\x7e\0\0\0\7"), where="section 'file'"), 1)


def chunk(number: int, length: int) -> bytes:
    return b"\1" + number.to_bytes(8, "big") + length.to_bytes(4, "big") + bytes(length)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (chunk(LIMIT // CHUNK, 1), "a file of at most 8388608"),
        (chunk(2**64 - 1, 1), "a file of at most 8388608"),
        (chunk(0, CHUNK + 1), "a chunk of at most 65536 bytes"),
        (b"\2" + (LIMIT + 1).to_bytes(8, "big"), "a file of at most 8388608 bytes .*, got one of 8388609"),
        (b"\3", "got one of the kind 3"),
    ],
)
def test_hostile_records(body: bytes, complaint: str, tmp_path: Path) -> None:
    loader = FileLoader(str(tmp_path / "file"), LIMIT)
    with pytest.raises(StreamError, match=complaint):
        load(loader, body + b"\0")
    loader.cleanup()
    loader.abandoned()
    assert list(tmp_path.iterdir()) == []


def test_a_destination_without_a_place_for_it_says_so() -> None:
    with pytest.raises(StreamError, match=r"the source sends a file along \(set parameter 'x-file' here"):
        load(FileLoader("", LIMIT), b"\0")


# -- errors of the disk ------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    interrupt = Interrupt()
    saver = FileSaver(str(tmp_path / "nowhere"))
    with pytest.raises(MachineError, match=r"cannot open '.*nowhere', which moves with the guest: No such file"):
        saver.setup(StreamWriter(MemorySink()), KitContext(Settings(), interrupt))
    saver.cleanup()
    interrupt.close()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    loader = FileLoader(str(tmp_path / "nowhere" / "file"), LIMIT)
    with pytest.raises(MachineError, match=r"cannot write '.*nowhere/file', which moves with the guest: No such file"):
        load(loader, b"\0")


# -- with a guest ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[Pair]:
    plugins = Plugins.load()
    plugins.register(migfw_file, "file")
    with Pair(plugins) as pair:
        yield pair


def test_a_file_moves_with_what_is_written_to_it_meanwhile(pair: Pair, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(noise(SIZE))
    there.write_bytes(b"an old one")
    source, destination = pair.source(), pair.destination()
    source.set_parameters({"x-file": str(here), "max-bandwidth": 1 << 20})
    destination.set_parameters({"x-file": str(there)})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert wait_until(lambda: chunks_sent(source) > 1)
    with here.open("r+b") as file:
        file.write(b"what was sent is changed")
        file.seek(0, os.SEEK_END)
        file.write(b"and it grows")
    assert there.read_bytes() == b"an old one"
    source.set_parameters({"max-bandwidth": 1 << 40})
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    assert there.read_bytes() == here.read_bytes()
    assert sorted(tmp_path.iterdir()) == [here, there]
    assert chunks_sent(source) > SIZE // CHUNK, "the changed chunk went again"
    received = query_migrate(destination)["x-migfw"]["sections"]["file"]
    assert received == {"path": str(there), "chunks-received": chunks_sent(source)}
    runs_on(destination)


def chunks_sent(source: Engine) -> int:
    sections = query_migrate(source)["x-migfw"]["sections"]
    return int(sections.get("file", {}).get("chunks-sent", 0))


def test_a_file_that_becomes_shorter(pair: Pair, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(noise(SIZE))
    source, destination = pair.source(), pair.destination()
    source.set_parameters({"x-file": str(here), "max-bandwidth": 1 << 20})
    destination.set_parameters({"x-file": str(there)})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert wait_until(lambda: chunks_sent(source) > 3)
    os.truncate(here, CHUNK + 10)
    source.set_parameters({"max-bandwidth": 1 << 40})
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    assert there.read_bytes() == here.read_bytes() == noise(SIZE)[: CHUNK + 10]


def test_a_migration_that_fails_leaves_the_old_file(pair: Pair, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(noise(SIZE))
    there.write_bytes(b"an old one")
    source, destination = pair.source(), pair.destination()
    source.set_parameters({"x-file": str(here), "max-bandwidth": 1 << 20})
    destination.set_parameters({"x-file": str(there)})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
    source.cancel()
    assert ended(source) is MigrationStatus.CANCELLED
    assert arrived(destination) is MigrationStatus.FAILED
    assert sorted(tmp_path.iterdir()) == [here, there]
    assert there.read_bytes() == b"an old one"
    runs_on(source)


@contextmanager
def files_limited(size: int) -> Iterator[None]:
    """Limit the size of files, which fails with EFBIG: an ordinary user cannot fill the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_fails_the_migration_and_the_guest_runs_on(pair: Pair, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(noise(SIZE))
    source, destination = pair.source(), pair.destination()
    source.set_parameters({"x-file": str(here)})
    destination.set_parameters({"x-file": str(there)})
    with files_limited(SIZE // 2):
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
    assert "there', which moves with the guest: File too large" in query_migrate(source)["error-desc"]
    assert list(tmp_path.iterdir()) == [here]
    runs_on(source)


def test_without_the_parameter_nothing_is_sent(pair: Pair, tmp_path: Path) -> None:
    source, destination = pair.source(), pair.destination()
    destination.set_parameters({"x-file": str(tmp_path / "there")})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    assert list(tmp_path.iterdir()) == []
