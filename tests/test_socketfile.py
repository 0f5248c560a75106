"""Who listens at a socket's path. Dialing and the QMP server, which use this, have tests of their own."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.net.socketfile import Occupant, make_room, occupant


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="file", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_nobody(folder: Path) -> None:
    assert occupant(folder / "none") is Occupant.NOBODY
    (folder / "file").touch()
    assert occupant(folder / "file" / "none") is Occupant.NOBODY


def test_a_listener_is_not_disturbed_and_is_found_also_when_its_backlog_is_full(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        assert occupant(path) is Occupant.LISTENER
        first.setblocking(False)
        assert first.connect_ex(str(path)) == 0, "the one place there is was still free"
        assert occupant(path) is Occupant.LISTENER
        with pytest.raises(OSError, match="in use"):
            make_room(path)


def test_a_stale_socket_goes(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert occupant(path) is Occupant.NOBODY
    assert not path.exists()


def test_one_that_goes_while_we_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "s"

    class Late(socket.socket):
        def connect_ex(self, address: object, /) -> int:
            path.unlink()
            return super().connect_ex(address)  # type: ignore[arg-type]  # whatever came

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        monkeypatch.setattr(socket, "socket", Late)
        assert occupant(path) is Occupant.NOBODY


def test_everything_else_stays(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "link").symlink_to("/nowhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(folder / "datagrams"))
        for name in ("file", "link", "datagrams"):
            assert occupant(folder / name) is Occupant.OTHER
            with pytest.raises(FileExistsError, match="not a stale socket of yours"):
                make_room(folder / name)
            assert os.path.lexists(folder / name)
