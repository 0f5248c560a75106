"""The README's program, copied from the page, moves from one engine to another with the README's commands."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cli import TIMEOUT, Command, migfw, start

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def runtime() -> Iterator[Path]:
    """The folder of the engines' sockets; its path is short, because a socket's path has at most 107 bytes."""
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def engines(runtime: Path) -> Iterator[list[Command]]:
    running: list[Command] = []
    yield running
    for process in running:
        process.terminate()
        process.finish()


def test_the_program_moves(tmp_path: Path, runtime: Path, engines: list[Command]) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = tmp_path / "heat.py"
    program.write_text(source)
    for command in ("heat.py:Heat --incoming tcp:0.0.0.0:4444", "heat.py:Heat\n"):
        assert f"migfw run {command}" in README

    def run(*arguments: str) -> str:
        process = start("run", f"{program}:Heat", *arguments, runtime=runtime)
        engines.append(process)
        assert process.stdout is not None
        return process.stdout.readline()

    waiting = run("--name", "there", "--incoming", "tcp:127.0.0.1:0")
    (uri,) = re.findall(r"tcp:127\.0\.0\.1:\d+", waiting)
    assert "the guest is running" in run("--name", "here")
    moved = migfw("migrate", uri, "--name", "here", runtime=runtime)
    assert moved.returncode == 0, moved.stderr
    assert engines[1].wait(TIMEOUT) == 0, "the source ends when its guest has moved"
    there = migfw("status", "--name", "there", runtime=runtime).stdout
    assert re.search(r"^guest: +running$", there, re.MULTILINE), there
