from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.plugins import Plugins
from corefw.qmp.server import QmpServer
from tests.qmp.support import TinyMachine

QEMU = "qemu-system-x86_64"
ACCEPTS = "00010000"
"""The flags of a socket that listens, in /proc/net/unix."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="qmp", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's runtime directory for engines, empty."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder / "migfw"


@pytest.fixture
def plugins() -> Plugins:
    return Plugins()


@pytest.fixture
def engine(plugins: Plugins) -> Iterator[Engine]:
    with contextlib.closing(Engine(TinyMachine(), plugins, plugins.settings(), name="tiny")) as engine:
        yield engine


@pytest.fixture
def server(engine: Engine, folder: Path) -> Iterator[QmpServer]:
    with QmpServer(engine, f"unix:{folder}/qmp") as server:
        yield server
    left = [entry.name for entry in folder.iterdir()]
    assert not [name for name in left if name.startswith(".") or name == "qmp"], f"the server left {left}"


def is_listening(path: Path) -> bool:
    """Whether a process listens there. Nothing connects to find out: QEMU has one client at a time, and may turn away
    the one that comes while it takes leave of another."""
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(fields[3] == ACCEPTS and fields[-1] == str(path) for fields in sockets)


@pytest.fixture
def qemu(folder: Path) -> Iterator[Path]:
    """The QMP socket of a QEMU without a guest."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"needs {QEMU}")
    path = folder / "qemu"
    command = [QEMU, "-M", "none", "-nodefaults", "-display", "none", "-S", "-qmp", f"unix:{path},server=on,wait=off"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not is_listening(path):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        yield path
    finally:
        process.kill()
        process.communicate()
