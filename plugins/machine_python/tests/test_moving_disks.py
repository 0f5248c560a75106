"""A program that moves finds its disk at the destination; if that fails, it continues at the source."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.machine import BlockMachine, MachineConfig, RunState
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until
from tests.helpers.engines import query_migrate
from tests.helpers.users import run_as_an_ordinary_user

PROGRAMS = Path(__file__).parent / "programs" / "disks.py"
PATIENCE = 60.0
S = MigrationStatus


class Hosts:
    """Engines with a program that has a disk."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def engine(self, program: str, image: Path, *, incoming: bool = False, **options: str) -> Engine:
        plugins = Plugins.load()
        machine = plugins.machine(
            "python", MachineConfig(f"{PROGRAMS}:{program}", {"image": str(image), **options}, incoming)
        )
        engine = Engine(machine, plugins, plugins.settings())
        engine.set_capabilities({"return-path": True})
        self._stack.callback(engine.close)
        return engine


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        yield Hosts(stack)


def step(engine: Engine) -> int:
    return int(str(engine.verify()["step"]))


def wait_for_more(engine: Engine) -> None:
    before = step(engine)
    assert wait_until(lambda: step(engine) > before + 100)


def refresh(copy: bytearray, engine: Engine, image: Path) -> None:
    """Copy what is dirty in the bitmap, and clear it."""
    assert isinstance(engine.machine, BlockMachine)
    (node,) = engine.machine.block_nodes()
    bitmap = node.bitmap("backup")
    with node.settled():
        dirty = bitmap.runs()
        bitmap.clear()
    with image.open("rb", buffering=0) as disk:
        for first, end in dirty.tolist():
            disk.seek(first)
            copy[first:end] = disk.read(end - first)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_back_and_forth_on_one_file_with_a_bitmap(hosts: Hosts, tmp_path: Path, postcopy: bool) -> None:
    """Each verify() compares the whole disk with the program's steps; backups miss no write."""
    image = tmp_path / "disk.raw"
    here = hosts.engine("Writer", image)
    assert isinstance(here.machine, BlockMachine)
    here.machine.block_nodes()[0].add_bitmap("backup", 512)
    copy = bytearray(image.read_bytes())
    here.cont()
    for _ in range(3):
        there = hosts.engine("Writer", image, incoming=True)
        for engine in (here, there):
            engine.set_capabilities({"dirty-bitmaps": True, "postcopy-ram": postcopy})
        here.set_parameters({"x-migfw-postcopy-start": "now" if postcopy else "on-command"})
        here.migrate(there.migrate_incoming("tcp:127.0.0.1:0"))
        assert there.wait_incoming(PATIENCE) is S.COMPLETED
        wait_for_more(there)
        refresh(copy, there, image)
        assert here.wait_outgoing(PATIENCE) is S.COMPLETED
        here.close()
        here = there
    wait_for_more(here)
    here.stop()
    refresh(copy, here, image)
    assert copy == image.read_bytes()


def written_in_postcopy(hosts: Hosts, image: Path) -> object:
    """Move a program that writes an array to its disk before the array has arrived; return verify()'s result there."""
    source = hosts.engine("Grid", image)
    destination = hosts.engine("Grid", image, incoming=True)
    for engine in (source, destination):
        engine.set_capabilities({"postcopy-ram": True})
    source.cont()
    source.set_parameters({"x-migfw-postcopy-start": "now"})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert destination.wait_incoming(PATIENCE) is S.COMPLETED
    return destination.verify()


def test_in_postcopy_an_array_is_written_that_has_not_arrived(hosts: Hosts, tmp_path: Path) -> None:
    assert written_in_postcopy(hosts, tmp_path / "disk.raw") == {"starts": 2}


def test_the_same_where_system_calls_do_not_wait() -> None:
    """The user's system calls fail on pages that have not arrived."""
    scenario = """
import contextlib, pathlib, sys, tempfile
sys.path.insert(0, sys.argv[1])
from test_moving_disks import Hosts, written_in_postcopy
with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    print(written_in_postcopy(Hosts(stack), pathlib.Path(folder) / "disk.raw"))
"""
    assert run_as_an_ordinary_user(scenario, str(PROGRAMS.parents[1])) == "{'starts': 2}"


def test_a_disk_of_another_length_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    source = hosts.engine("Writer", tmp_path / "one.raw")
    (tmp_path / "other.raw").write_bytes(bytes(8192 * 512))
    destination = hosts.engine("Writer", tmp_path / "other.raw", incoming=True, sectors="8192")
    source.cont()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert source.wait_outgoing(PATIENCE) is S.FAILED
    assert (
        "this program has different disks: 'disk0' is 2097152 bytes at the source and 4194304 bytes at the destination"
        " (both sides need the same files)"
    ) in query_migrate(source)["error-desc"]
    assert source.machine.run_state is RunState.RUNNING
    source.verify()


def test_a_guest_whose_disk_is_in_use_there_goes_on_here(hosts: Hosts, tmp_path: Path) -> None:
    """The destination has a copy that another process has locked."""
    image, copy = tmp_path / "disk.raw", tmp_path / "copy.raw"
    source = hosts.engine("Writer", image)
    shutil.copy(image, copy)
    destination = hosts.engine("Writer", copy, incoming=True)
    assert isinstance(source.machine, BlockMachine)
    bitmap = source.machine.block_nodes()[0].add_bitmap("one", 512)
    source.cont()
    fd = os.open(copy, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 101, 1, 0))
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert source.wait_outgoing(PATIENCE) is S.FAILED
    finally:
        os.close(fd)
    assert "disk 'disk0' is in use" in query_migrate(source)["error-desc"]
    assert wait_until(lambda: source.machine.run_state is RunState.RUNNING)
    source.verify()
    bitmap.clear()
    assert wait_until(lambda: bitmap.count() > 0)
