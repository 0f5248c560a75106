"""WholeFile: a path has the complete new file, or still what it had before."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from corefw.net.wholefile import WholeFile

FINISH: dict[str, Callable[[WholeFile], None]] = {"replace": WholeFile.replace, "create": WholeFile.create}


@pytest.mark.parametrize("way", FINISH)
def test_it_appears_when_it_is_whole(tmp_path: Path, way: str) -> None:
    path = tmp_path / "out"
    with WholeFile(path) as file:
        file.write(b"one", bytearray(b"two"), memoryview(b"three"))
        assert not path.exists()
        FINISH[way](file)
        assert path.read_bytes() == b"onetwothree"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_an_end_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), WholeFile(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_create_does_not_replace(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with WholeFile(path) as file:
        file.write(b"new")
        path.write_bytes(b"made meanwhile")
        with pytest.raises(FileExistsError):
            file.create()
    assert path.read_bytes() == b"made meanwhile"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_replace_keeps_the_mode_and_replaces_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    for target in (path, link):
        with WholeFile(target) as file:
            file.write(b"new")
            file.replace()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert not link.is_symlink()
    assert stat.S_IMODE(link.stat().st_mode) == 0o600


@pytest.mark.parametrize("old", [b"", b"0123456789"])
def test_the_start_is_kept(tmp_path: Path, old: bytes) -> None:
    path = tmp_path / "out"
    if old:
        path.write_bytes(old)
    with WholeFile(path, kept=4) as file:
        file.write(b"new")
        file.replace()
    assert path.read_bytes() == (old[:4] or bytes(4)) + b"new"


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    """/dev/full behind the descriptor stands for the disk."""
    path = tmp_path / "out"
    with WholeFile(path) as file:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file.fileno())
        os.close(full)
        with pytest.raises(OSError, match="No space left"):
            file.write(b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", [*FINISH.values(), WholeFile.rename])
def test_after_close_it_cannot_take_the_name(tmp_path: Path, way: Callable[[WholeFile], None]) -> None:
    file = WholeFile(tmp_path / "out")
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        way(file)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WholeFile(tmp_path / "nowhere" / "out")
