"""Engines for the tests of the command line: real `migfw run` processes that always end with their test."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corefw.qmp.client import QmpClient
from tests.helpers.cli import TIMEOUT, migfw, start

SMALL = ("stress", "--opt=ram=1M", "--opt=working-set=64K", "--opt=dirty-rate=1M")


class Engine:
    """A `migfw run`. `line` is what it printed when it was ready."""

    def __init__(self, runtime: Path, *arguments: str) -> None:
        self.runtime = runtime
        self.process = start("run", *arguments, runtime=runtime)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()

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
        out, err = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, out, err

    def end(self) -> None:
        """End it and its guest, also in postcopy, where it declines the first signal."""
        for seconds in (3, 10):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


class Engines:
    """Starts engines that share a runtime directory."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self._started: list[Engine] = []

    def __call__(self, *arguments: str) -> Engine:
        engine = Engine(self.runtime, *arguments)
        self._started.append(engine)
        return engine

    def sockets(self) -> list[str]:
        return sorted(path.name for path in (self.runtime / "migfw").glob("*"))

    def close(self) -> None:
        for engine in self._started:
            engine.end()


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
