"""The real `migfw`, as a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

MIGFW: Final = (sys.executable, "-m", "corefw.cli")

TIMEOUT: Final = 60.0


def migfw(*arguments: str, runtime: Path | None = None, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run it to its end. `runtime` is where engines' sockets are looked for (XDG_RUNTIME_DIR)."""
    return subprocess.run(
        [*MIGFW, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(runtime),
        timeout=timeout,
        check=False,
    )


def start(*arguments: str, runtime: Path | None = None) -> subprocess.Popen[str]:
    """Run it beside the test, which ends it; stdout and stderr are pipes."""
    return subprocess.Popen(
        [*MIGFW, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(runtime),
    )


def environment(runtime: Path | None) -> Mapping[str, str]:
    changed = {"XDG_RUNTIME_DIR": str(runtime)} if runtime is not None else {}
    return {**os.environ, **changed, "COLUMNS": "100", "TERM": "dumb"}
