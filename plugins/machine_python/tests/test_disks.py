"""A program's disk: its writes are in the file and in the bitmaps, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from corefw_machine_python import PythonMachine, guest
from corefw_machine_python.guest import Program

from corefw.block import DirtyBitmap
from corefw.errors import MachineError, UsageError
from corefw.machine import MachineConfig, RunState
from corefw.testing.tasks import wait_until
from tests.helpers.qemu import Qemu, needs_qemu

PROGRAMS = Path(__file__).parent / "programs" / "disks.py"
SECTOR = 512

Make = Callable[..., PythonMachine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make machines with their disk in a file of the test; they are closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(program: str, incoming: bool = False, **options: str) -> PythonMachine:
            given = {"image": str(tmp_path / "disk.raw"), **options}
            machine = PythonMachine(MachineConfig(f"{PROGRAMS}:{program}", given, incoming))
            stack.callback(machine.close)
            return machine

        yield make


def wait_for(machine: PythonMachine, state: RunState) -> None:
    assert wait_until(lambda: machine.run_state is state), f"still {machine.run_state}, not {state}"


def fields(machine: PythonMachine) -> dict[str, object]:
    found = machine.information()["fields"]
    assert isinstance(found, dict)
    return found


def sectors(bitmap: DirtyBitmap) -> list[int]:
    return [one for first, end in bitmap.runs().tolist() for one in range(first // SECTOR, end // SECTOR)]


def wait_for_bits(bitmap: DirtyBitmap, least: int) -> None:
    assert wait_until(lambda: bitmap.count() > least)


def changed(before: bytes, after: bytes) -> set[int]:
    rows = [np.frombuffer(one, np.uint8).reshape(-1, SECTOR) for one in (before, after)]
    return set(np.flatnonzero((rows[0] != rows[1]).any(axis=1)).tolist())


def test_what_the_program_writes_is_in_the_file_and_in_its_bitmaps(make: Make, tmp_path: Path) -> None:
    machine = make("Counter")
    one, two = machine.block_nodes()
    assert (one.name, one.device, one.length, one.driver) == ("disk0", "disk0", 1 << 20, "raw")
    assert one.filename == str(tmp_path / "disk.raw")
    assert (two.name, two.length) == ("disk1", SECTOR)
    fine, coarse = one.add_bitmap("fine", 512), one.add_bitmap("coarse", 4096)
    off, other = one.add_bitmap("off", 512, enabled=False), two.add_bitmap("other", 512)
    machine.start()
    assert wait_until(lambda: fields(machine)["step"] == 100)
    late = one.add_bitmap("late", 512)
    assert sectors(fine) == list(range(100))
    assert coarse.count() == 13 * 4096
    assert off.count() == other.count() == late.count() == 0
    data = (tmp_path / "disk.raw").read_bytes()
    assert data == b"".join(bytes([1 + step]) * SECTOR for step in range(100)) + bytes((1 << 20) - 100 * SECTOR)
    machine.close()
    assert sectors(fine) == list(range(100)), "the bitmaps outlive the guest"


def test_a_backup_of_what_is_dirty_misses_no_write(make: Make, tmp_path: Path) -> None:
    """Clear the bitmap and copy what was dirty, again and again, while the guest writes."""
    machine = make("Writer")
    (node,) = machine.block_nodes()
    bitmap = node.add_bitmap("backup", 1024)
    machine.start()
    backup = bytearray(node.length)
    rounds = copied = 0

    def copy() -> int:
        with node.settled():
            dirty = bitmap.runs()
            bitmap.clear()
        with (tmp_path / "disk.raw").open("rb") as image:
            for first, end in dirty.tolist():
                image.seek(first)
                backup[first:end] = image.read(end - first)
        return int((dirty[:, 1] - dirty[:, 0]).sum())

    while rounds < 200 or copied < 4 * node.length:
        copied += copy()
        rounds += 1
    machine.stop(RunState.PAUSED)
    assert copy() < node.length
    assert backup == (tmp_path / "disk.raw").read_bytes()
    assert copy() == 0


def test_a_guest_that_is_killed_leaves_bitmaps_that_have_every_write(make: Make, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    for least in (100_000, 200_000, 300_000):
        machine = make("Writer", sectors="65536")
        (node,) = machine.block_nodes()
        machine.start()
        machine.stop(RunState.PAUSED)
        before = image.read_bytes()
        bitmap = node.add_bitmap("since", 512)
        machine.start()
        wait_for_bits(bitmap, least)
        os.kill(machine.pid, signal.SIGKILL)
        wait_for(machine, RunState.INTERNAL_ERROR)
        dirty, differs = set(sectors(bitmap)), changed(before, image.read_bytes())
        assert differs <= dirty, "a write is in the file, and not in the bitmap"
        assert len(dirty - differs) <= 8, "and at most the write that was cut short is only in the bitmap"
        image.unlink()


def test_a_write_that_the_guests_death_cuts_short_counts_as_done(make: Make, tmp_path: Path) -> None:
    """The bitmap is cleared, and the guest killed, while the guest is writing its whole disk."""
    image = tmp_path / "disk.raw"
    machine = make("Bulk")
    (node,) = machine.block_nodes()
    bitmap = node.add_bitmap("one", 65536)
    machine.start()
    wait_for_bits(bitmap, 0)
    with image.open("rb") as file:
        bitmap.clear()
        first = os.pread(file.fileno(), 1, 0)
        while os.pread(file.fileno(), 1, 0) == first:
            pass
        os.kill(machine.pid, signal.SIGKILL)
    wait_for(machine, RunState.INTERNAL_ERROR)
    assert bitmap.count() == node.length


def test_the_file_is_open_and_locked_while_the_guest_runs(make: Make) -> None:
    one, other = make("Writer"), make("Writer", incoming=True)
    one.start()
    with pytest.raises(MachineError, match=r"disk 'disk0' is in use: another guest, or a QEMU, has .*disk\.raw open"):
        other.start()
    one.stop(RunState.PAUSED)
    other.start()
    with pytest.raises(MachineError, match="disk 'disk0' is in use"):
        one.start()
    other.stop(RunState.PAUSED)
    one.start()
    assert one.run_state is RunState.RUNNING


@pytest.mark.qemu
@needs_qemu
def test_a_guest_and_a_qemu_keep_out_of_each_others_images(make: Make, tmp_path: Path) -> None:
    machine = make("Writer")
    writing = ("-drive", f"file={tmp_path}/disk.raw,format=raw,if=none,id=disk", "-device", "ide-hd,drive=disk")
    image = f"driver=raw,file.driver=file,file.filename={tmp_path}/disk.raw,node-name=disk"
    sharing = ("-blockdev", f"{image},read-only=on,force-share=on", "-device", "ide-cd,drive=disk")
    with contextlib.closing(Qemu(*writing, paused=True)), pytest.raises(MachineError, match="disk 'disk0' is in use"):
        machine.start()
    machine.start()
    with pytest.raises(AssertionError, match="Failed to lock byte 101"):
        Qemu(*writing, paused=True)
    with contextlib.closing(Qemu(*sharing, paused=True)):
        machine.stop(RunState.PAUSED)
        machine.start()


def test_a_program_that_is_stopped_cannot_write(make: Make) -> None:
    machine = make("Background")
    machine.start()
    assert wait_until(lambda: int(str(fields(machine)["ticks"])) > 10)
    machine.stop(RunState.PAUSED)
    machine.start()
    expected = "disk 'disk0': a program that is stopped cannot write to it"
    assert wait_until(lambda: fields(machine)["refused"] == expected)


def test_a_forked_process_does_not_keep_the_lock(make: Make) -> None:
    one, other = make("Forks"), make("Forks", incoming=True)
    one.start()
    one.stop(RunState.PAUSED)
    other.start()


def test_threads_may_read_at_any_time(make: Make) -> None:
    machine = make("Readers")
    for _ in range(20):
        machine.start()
        machine.stop(RunState.PAUSED)
    machine.start()
    assert fields(machine)["wrong"] == ""


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("beyond_the_end", "ValueError: disk 'disk0' has 2048 bytes: 2 at 2047 are not among them"),
        ("before_the_beginning", "ValueError: disk 'disk0' has 2048 bytes: 1 at -1 are not among them"),
        ("replaces", "AttributeError: a disk cannot be replaced: write to it, as in self.disk.pwrite(data, offset)"),
        ("forks", "ZeroDivisionError: the child ended with 7"),
    ],
)
def test_what_a_program_must_not_do(make: Make, what: str, reason: str) -> None:
    machine = make("Careless", what=what)
    machine.start()
    wait_for(machine, RunState.INTERNAL_ERROR)
    assert str(machine.information()["error"]).startswith(reason)


def test_files_that_cannot_be_disks(make: Make, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    with pytest.raises(UsageError, match=r"No such file.*a destination needs the file too: shared storage, or a copy"):
        make("Writer", incoming=True)
    assert not image.exists(), "a destination creates nothing"
    image.mkdir()
    with pytest.raises(UsageError, match="neither a file nor a block device"):
        make("Writer")
    image.rmdir()
    image.write_bytes(bytes(1024))
    with pytest.raises(UsageError, match="has 1024 bytes, the program wants 2097152"):
        make("Writer")
    with pytest.raises(UsageError, match="has no path with these options"):
        make("Writer", image="")


def test_a_file_that_changes_its_length_is_noticed(make: Make, tmp_path: Path) -> None:
    machine = make("Writer")
    os.truncate(tmp_path / "disk.raw", 4096)
    with pytest.raises(MachineError, match="disk 'disk0' had 2097152 bytes, and now has 4096"):
        machine.start()


def test_wrong_declarations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="program 'Twice': two disks have the name 'disk0'"):
        PythonMachine(MachineConfig(f"{PROGRAMS}:Twice"))
    with pytest.raises(UsageError, match="disk 'disk0' would have 1000 bytes: a disk has a multiple of 512"):
        PythonMachine(MachineConfig(f"{PROGRAMS}:Odd"))
    for name in ("", "1", "a b", "x" * 32):
        with pytest.raises(ValueError, match="a disk's name has"):
            guest.disk(name, "path")

    class Late(Program):
        disk = guest.disk("disk0", "path")

    with pytest.raises(AttributeError, match="disk 'disk0' does not exist yet"):
        _ = Late(guest.Options({})).disk
