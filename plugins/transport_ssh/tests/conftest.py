from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sshd import Sshd, missing_programs, running_sshd


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One real sshd for all tests."""
    if missing := missing_programs():
        pytest.skip(f"needs OpenSSH: {', '.join(missing)}")
    with running_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def home(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$HOME with a key that the sshd lets in and a known_hosts that knows it; no ssh-agent."""
    home = sshd.make_home(tmp_path / "home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose paths are short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ms", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)
