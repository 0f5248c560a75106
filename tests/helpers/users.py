"""Run a command as an unprivileged user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Final

import pytest

NOBODY: Final = 65534


def as_an_ordinary_user() -> list[str]:
    """Words to put before a command. One capability of root stays, to search folders: Python may be in root's home."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not here")
    caps = "-all,+dac_read_search"
    who = ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    return ["setpriv", *who, f"--inh-caps={caps}", f"--ambient-caps={caps}", f"--bounding-set={caps}"]


def run_as_an_ordinary_user(code: str, *arguments: str) -> str:
    """Run Python code as an ordinary user, and return what it prints."""
    done = subprocess.run(
        [*as_an_ordinary_user(), sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env={**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
