"""`migfw demo`, with a small guest."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cli import TIMEOUT, migfw, start
from tests.helpers.qemu import wait_until

SMALL = ("--ram=16M", "--working-set=1M", "--dirty-rate=4M")
ENDLESS = ("--ram=16M", "--working-set=1M", "--dirty-rate=1")
"""The guest writes one page, and the next an hour later, for which the demo waits."""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for the demo's temporary files; nothing must be left in it."""
    folder = Path(f"/tmp/migfw-t{os.getpid()}")
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    left = list(folder.iterdir())
    folder.rmdir()
    assert not left


def engines(folder: Path) -> list[int]:
    """The process ids of engines with a socket in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(str(folder)) in command and b"run" in command.split(b"\0"):
            found.append(int(path.parent.name))
    return found


def test_it_ends_with_ok(temporary: Path) -> None:
    done = migfw("demo", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    *_, proof, last = done.stdout.splitlines()
    assert last == "demo: ok"
    assert proof.startswith("proof: ")
    assert "status:     completed" in done.stdout
    assert not engines(temporary)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(temporary: Path, number: signal.Signals) -> None:
    process = start("demo", *ENDLESS)
    wait_until(lambda: engines(temporary), "the demo's engines")
    process.send_signal(number)
    out, err = process.finish()
    assert process.returncode == 130
    assert "demo: ok" not in out
    assert "Traceback" not in err
    assert not engines(temporary)


def test_killed_it_leaves_no_engine(temporary: Path) -> None:
    process = start("demo", *ENDLESS)
    wait_until(lambda: len(engines(temporary)) == 2, "the demo's engines")
    process.kill()
    process.finish()
    wait_until(lambda: not engines(temporary), "the engines to end")
    for folder in temporary.iterdir():  # a killed demo cannot remove it
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [("--ram=much", "is not a size"), ("--dirty-rate=0", "more than zero"), ("--working-set=32M", "working-set")],
)
def test_a_wrong_size_is_one_line(temporary: Path, argument: str, complaint: str) -> None:
    done = migfw("demo", *SMALL, argument)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert complaint in done.stderr


def test_it_needs_no_terminal_size(temporary: Path) -> None:
    """With next to nothing in the environment, either."""
    done = subprocess.run(
        [sys.executable, "-m", "corefw.cli", "demo", *SMALL],
        env={"PATH": os.environ["PATH"], "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "demo: ok", "")
