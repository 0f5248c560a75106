"""Names and addresses of engines; another user's directory is never trusted."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.errors import UriError, UsageError
from corefw.qmp.address import find_engines, named_address, parse_address, resolve, runtime_directory
from corefw.qmp.server import QmpServer
from corefw.uri import TcpAddress, UnixAddress


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/x.qmp", UnixAddress("/run/x.qmp")),
        ("unix:relative:path", UnixAddress("relative:path")),
        ("tcp:host:4444", TcpAddress("host", 4444)),
        ("tcp:[::1]:4444", TcpAddress("::1", 4444)),
        ("tcp::0", TcpAddress("", 0)),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_address(text) == address
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected unix:PATH or tcp:HOST:PORT"),
        ("/run/x.qmp", "expected unix:PATH or tcp:HOST:PORT"),
        ("unix:", "expected unix:PATH or tcp:HOST:PORT"),
        ("vsock:1:2", "expected unix:PATH or tcp:HOST:PORT"),
        ("unix:@abstract", "has to be a file"),
        ("unix:a\0b", "has to be a file"),
        ("unix:/" + 107 * "x", "the path has 108 bytes, a UNIX socket's can have 107"),
        ("tcp:host", "has no port"),
        ("tcp:host:ssh", "is not a port"),
        ("tcp:::1:22", "brackets"),
    ],
)
def test_wrong_addresses(text: str, why: str) -> None:
    with pytest.raises(UriError, match=why):
        parse_address(text)


def test_the_runtime_directory_is_made_private(runtime: Path) -> None:
    assert runtime_directory() == runtime
    assert runtime.stat().st_mode & 0o777 == 0o700
    runtime.chmod(0o755)
    runtime_directory()
    assert runtime.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def in_tmp() -> Iterator[Path]:
    """The directory of engines without XDG_RUNTIME_DIR. It is removed afterwards if it is not in use."""
    path = Path(f"/tmp/migfw-{os.geteuid()}")
    existed = path.exists()
    yield path
    if not existed:
        with suppress(OSError):
            path.rmdir()


@pytest.mark.parametrize("value", [None, "", "/nowhere/at/all"])
def test_without_a_runtime_directory_there_is_one_in_tmp(value: str | None, in_tmp: Path) -> None:
    assert runtime_directory({} if value is None else {"XDG_RUNTIME_DIR": value}) == in_tmp
    assert in_tmp.stat().st_mode & 0o777 == 0o700


def test_a_link_or_a_file_in_its_place_is_refused(runtime: Path, folder: Path) -> None:
    runtime.symlink_to(folder)
    with pytest.raises(UsageError, match="has to be a directory"):
        runtime_directory()
    runtime.unlink()
    runtime.touch()
    with pytest.raises(UsageError, match="has to be a directory"):
        runtime_directory()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a directory away")
def test_another_users_directory_is_refused(runtime: Path, folder: Path, in_tmp: Path) -> None:
    runtime.mkdir()
    os.chown(runtime, 65534, 65534)
    with pytest.raises(UsageError, match=r"belongs to user 65534, expected 0"):
        runtime_directory()
    os.chown(folder, 65534, 65534)
    # XDG_RUNTIME_DIR belongs to another user (su, sudo), so we do not use it.
    assert runtime_directory() == in_tmp


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../x", "ä", "x" * 65, "a\n"])
def test_names_that_cannot_be(runtime: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not a valid engine name"):
        named_address(name)


def test_finding_engines(engine: Engine, runtime: Path) -> None:
    with pytest.raises(UsageError, match="no engine is running: start one with 'migfw run'"):
        resolve()
    with QmpServer(engine, named_address("one")) as one:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(runtime / "dead.qmp"))
        (runtime / "not-a-socket.qmp").touch()
        (runtime / "other").touch()
        assert [info.name for info in find_engines()] == ["one"]
        assert sorted(path.name for path in runtime.iterdir()) == ["not-a-socket.qmp", "one.qmp", "other"]
        assert resolve() == one.address
        with QmpServer(engine, named_address("two")) as two:
            with pytest.raises(UsageError, match=r"several engines are running: choose one with --name \(one, two\)"):
                resolve()
            assert resolve("two") == two.address
            assert resolve(qmp="tcp:host:1") == TcpAddress("host", 1)
            with pytest.raises(UsageError, match=r"no engine named 'dead' is running \(running: one, two\)"):
                resolve("dead")
