"""Engines for the tests of the command line: real `migfw run` processes that always end with their test."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pytest

from corefw.qmp.client import QmpClient
from tests.helpers.cli import MIGFW, TIMEOUT, environment, migfw, start

SMALL = ("stress", "--opt=ram=1M", "--opt=working-set=64K", "--opt=dirty-rate=1M")


class Engine:
    """A `migfw run`."""

    def __init__(self, runtime: Path, *arguments: str) -> None:
        self.runtime = runtime
        self.process = start("run", *arguments, runtime=runtime)

    @cached_property
    def line(self) -> str:
        """What it prints when it is ready."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    @property
    def name(self) -> str:
        found = re.match(r"migfw: '([^']*)'", self.line)
        assert found, f"{self.line!r} {self.finish()}"
        return found[1]

    @property
    def address(self) -> str:
        return self.line.partition("QMP at ")[2].partition(";")[0]

    @property
    def uri(self) -> str:
        """The URI at which it waits for a migration."""
        assert " at " in self.line, f"{self.line!r} {self.finish()}"
        return self.line.rpartition(" at ")[2]

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another `migfw` command on this engine."""
        return migfw(*arguments, "--name", self.name, runtime=self.runtime)

    def ask(self, command: str) -> Any:
        """Execute a QMP command and return its result."""
        with QmpClient(self.address) as client:
            return client.execute(command)

    def finish(self) -> tuple[int, str, str]:
        """Wait until it has ended: its status, its stdout after the first line, and its stderr."""
        out, err = self.process.finish()
        return self.process.returncode, out, err

    def end(self) -> None:
        """End it and its guest, also in postcopy, where it declines the first signal."""
        for seconds in (3, 10):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
        self.process.end()


class Engines:
    """Starts engines that share a runtime directory."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self._started: list[Engine] = []

    def __call__(self, *arguments: str) -> Engine:
        """Start one, and wait until it is ready or has ended."""
        engine = Engine(self.runtime, *arguments)
        self._started.append(engine)
        _ = engine.line
        return engine

    def sockets(self) -> list[str]:
        return sorted(path.name for path in (self.runtime / "migfw").glob("*"))

    def close(self) -> None:
        for engine in self._started:
            engine.end()


class Terminal:
    """A `migfw` on a terminal of 120 columns."""

    def __init__(self, runtime: Path, *arguments: str) -> None:
        self._controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [*MIGFW, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            env={**environment(runtime), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        )
        os.close(terminal)

    def read_until(self, text: str) -> str:
        """What it shows up to this text, and whatever comes with that."""
        seen, end = b"", time.monotonic() + TIMEOUT
        while text not in seen.decode(errors="replace"):
            assert time.monotonic() < end, f"no {text!r} in {seen!r}"
            seen += self._read(1.0)
        return seen.decode(errors="replace")

    def read_all(self) -> str:
        """What it shows until it ends."""
        seen = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while more := self._read(TIMEOUT):
                seen += more
        return seen.decode(errors="replace")

    def _read(self, seconds: float) -> bytes:
        ready = select.select([self._controller], [], [], seconds)[0]
        return os.read(self._controller, 1 << 16) if ready else b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._controller)


@contextlib.contextmanager
def running_engines() -> Iterator[Engines]:
    """Engines that end with the block."""
    runtime = Path(tempfile.mkdtemp(prefix="migfw-", dir="/tmp"))
    started = Engines(runtime)
    try:
        yield started
    finally:
        started.close()
        shutil.rmtree(runtime)


@pytest.fixture
def engines() -> Iterator[Engines]:
    with running_engines() as started:
        yield started


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine for all tests of a module, which must not end or migrate it."""
    with running_engines() as started:
        yield started(*SMALL)
