"""Run the real `migfw` in a subprocess."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

MIGFW: Final = (sys.executable, "-m", "corefw.cli")

TIMEOUT: Final = 120.0
"""Seconds for one command, far beyond what it takes."""


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


class Command(subprocess.Popen[str]):
    """A process of a test, with pipes for its stdout and stderr."""

    def finish(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """Wait until it has ended; the rest of its stdout and of its stderr.

        communicate() would lose what readline() has read ahead: the lines that came together with the one it returned.
        """
        assert self.stdout is not None and self.stderr is not None
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as readers:
            out, err = (readers.submit(pipe.read) for pipe in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return out.result(), err.result()

    def end(self) -> None:
        """Kill it if it runs, and close its pipes."""
        self.kill()
        self.wait()
        for pipe in (self.stdout, self.stderr):
            assert pipe is not None
            pipe.close()


_started: list[Command] = []


def start(*arguments: str, runtime: Path | None = None) -> Command:
    """Start it; it ends with the test at the latest."""
    return launch([*MIGFW, *arguments], environment(runtime))


def launch(command: Sequence[str | Path], environ: Mapping[str, str]) -> Command:
    """The same for any command, with this environment."""
    process = Command(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    _started.append(process)
    return process


@contextlib.contextmanager
def ending_commands() -> Iterator[None]:
    """End what was started in the block and is still there, so that a test that fails leaves nothing to those after
    it."""
    before = len(_started)
    try:
        yield
    finally:
        while len(_started) > before:
            _started.pop().end()


def environment(runtime: Path | None) -> Mapping[str, str]:
    changed = {"XDG_RUNTIME_DIR": str(runtime)} if runtime is not None else {}
    return {**os.environ, **changed, "COLUMNS": "100", "TERM": "dumb"}
