"""Runs the real `migfw` in a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

MIGFW: Final = (sys.executable, "-m", "corefw.cli")

TIMEOUT: Final = 60.0


def migfw(*arguments: str, runtime: Path | None = None, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run it until it ends. `runtime` is the folder of the engines' sockets (XDG_RUNTIME_DIR)."""
    return subprocess.run(
        [*MIGFW, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(runtime),
        timeout=timeout,
        check=False,
    )


def migfw_each(commands: Sequence[Sequence[str]], runtime: Path) -> list[tuple[int, str, str]]:
    """Run commands one after another in a single new interpreter, for speed: status, stdout and stderr of each.

    Only for commands that end by themselves.
    """
    program = (
        "import contextlib, io, json, sys\n"
        "from corefw.cli import main\n"
        "results = []\n"
        "for arguments in json.load(sys.stdin):\n"
        "    sys.argv = ['migfw', *arguments]\n"
        "    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        status = int(main())\n"
        "    results.append([status, *(each.buffer.getvalue().decode() for each in (out, err))])\n"
        "json.dump(results, sys.stdout)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([list(arguments) for arguments in commands]),
        capture_output=True,
        text=True,
        env=environment(runtime),
        timeout=TIMEOUT,
        check=True,
    )
    return [(status, out, err) for status, out, err in json.loads(done.stdout)]


def check_refused(wrong: Mapping[tuple[str, ...], str], command: Sequence[str], runtime: Path) -> None:
    """Check that each is refused: nothing on stdout, one line on stderr with the complaint, status 2."""
    results = migfw_each([(*command, *arguments) for arguments in wrong], runtime)
    for (arguments, complaint), (status, out, err) in zip(wrong.items(), results, strict=True):
        line = f"{' '.join((*command, *arguments))}: {status} {out!r} {err!r}"
        assert (status, out) == (2, ""), line
        assert err.startswith("migfw: "), line
        assert err.count("\n") == 1, line
        assert complaint in err, line


def start(*arguments: str, runtime: Path | None = None) -> subprocess.Popen[str]:
    """Start it. The caller ends it; stdout and stderr are pipes."""
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
