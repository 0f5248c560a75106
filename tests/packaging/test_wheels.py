"""Wheels of the core, the plugins and the examples, installed in a clean environment as users would.

Invariant: nothing here sees the source tree. Everything that runs was built into a wheel and installed with the
dependencies that the wheels declare.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "plugins" / "ram_kernel"


def compiles() -> bool:
    """Whether programs with the C library's headers can be compiled here, as the Makefile checks."""
    cc = [*shlex.split(os.environ.get("CC") or "cc"), "-fPIC", "-shared", "-x", "c", "-o", "/dev/null", "-"]
    try:
        return subprocess.run(cc, input=b"#include <sys/socket.h>\n", stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


COMPILES = compiles()
DISTRIBUTIONS = [
    ROOT,
    *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml") if COMPILES or path.parent != COMPILED),
]
EXAMPLES = sorted(path.parent for path in ROOT.glob("examples/*/pyproject.toml"))
NO_REGISTRY = re.compile(r"NewConnectionError|NameResolutionError|ConnectTimeoutError|Network is unreachable")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(*command: str | Path, **more: str) -> str:
    """Run a program that must succeed, and return its stdout."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd="/",  # so that the source tree is not found by accident
        env={**os.environ, "PYTHONPATH": "", **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The name of each distribution -> its wheel."""
    into = tmp_path_factory.mktemp("wheels")

    def build(distribution: Path) -> None:
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", into, distribution)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, [*DISTRIBUTIONS, *EXAMPLES]))
    return {path.name.split("-")[0].replace("_", "-"): path for path in sorted(into.glob("*.whl"))}


@pytest.fixture(scope="module")
def clean(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with nothing but the wheels and their dependencies."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--no-compile", *map(str, wheels.values())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    if done.returncode and NO_REGISTRY.search(done.stderr):
        pytest.skip("needs a package registry, and none can be reached")
    assert done.returncode == 0, done.stderr
    run(*pip, "check")
    return python.parent


def about(wheel: Path) -> tuple[set[str], Message]:
    """The names of a wheel's files, and its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return names, message_from_bytes(archive.read(metadata))


def test_every_distribution_is_a_wheel_that_is_typed_and_has_no_tests(wheels: dict[str, Path]) -> None:
    assert len(wheels) == len(DISTRIBUTIONS) + len(EXAMPLES)
    for wheel in wheels.values():
        names, metadata = about(wheel)
        assert any(name.endswith("/py.typed") for name in names), wheel
        assert not [name for name in names if "test_" in name or "/tests/" in name or name.endswith(".pyc")]
        assert metadata["Requires-Python"] == ">=3.11"
        assert metadata["Summary"]
    names, metadata = about(wheels["migfw"])
    assert metadata["License-Expression"] == "GPL-2.0-or-later"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "# migfw" in str(metadata.get_payload())


def test_everything_that_is_installed_loads(clean: Path, wheels: dict[str, Path]) -> None:
    listed = json.loads(run(clean / "migfw", "plugins", "--json"))
    assert [row for row in listed if row["error"]] == []
    assert {row["distribution"] for row in listed} == wheels.keys() - {"migfw"}
    version = about(wheels["migfw"])[1]["Version"]
    assert version in run(clean / "migfw", "--version")


@pytest.mark.skipif(not COMPILES, reason="needs a C compiler (cc)")
def test_compiled_code_is_a_wheel_for_every_python_and_is_used(clean: Path, wheels: dict[str, Path]) -> None:
    names, _ = about(wheels["migfw-ram-kernel"])
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheels["migfw-ram-kernel"].name)
    assert "corefw_ram_kernel/kernel.so" in names
    assert not [name for name in names if name.endswith((".c", ".h"))]
    assert "migfw-ram-kernel" in str(about(wheels["migfw"])[1].get_all("Requires-Dist"))
    used = run(clean / "python", "-c", "from corefw_ram.kernel import find_kernel; print(find_kernel().__module__)")
    assert used == "corefw_ram_kernel\n"


def test_without_a_compiler_the_build_says_that_compiled_code_can_be_left_out(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, COMPILED],
        env={**os.environ, "CC": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "install a C compiler, Debian: gcc and libc6-dev; or leave migfw-ram-kernel out" in done.stdout + done.stderr


def test_nothing_of_it_comes_from_the_source_tree(clean: Path) -> None:
    listed = json.loads(run(clean / "migfw", "plugins", "--json"))
    modules = sorted({row["target"].partition(":")[0] for row in listed} | {"corefw"})
    script = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    for file in run(clean / "python", "-c", script, *modules).splitlines():
        assert Path(file).is_relative_to(clean.parent), file


# -- a migration ---------------------------------------------------------------------------------------------------


class Engines:
    """Starts `migfw run` in the clean environment. All engines end with the test."""

    def __init__(self, programs: Path, runtime: Path) -> None:
        self._migfw = str(programs / "migfw")
        self._environment = {**os.environ, "PYTHONPATH": "", "XDG_RUNTIME_DIR": str(runtime)}
        self._running: list[subprocess.Popen[str]] = []

    def run(self, name: str, *arguments: str) -> str:
        """Start an engine, and return what it prints when it is ready."""
        process = subprocess.Popen(
            [self._migfw, "run", "--name", name, *arguments],
            cwd="/",
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"'{name}' ended with {process.wait()} before it was ready"
        return line

    def ask(self, *arguments: str) -> str:
        return run(self._migfw, *arguments, XDG_RUNTIME_DIR=self._environment["XDG_RUNTIME_DIR"])

    def close(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait(60)
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def engines(clean: Path) -> Iterator[Engines]:
    runtime = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, for UNIX sockets
    made = Engines(clean, runtime)
    yield made
    made.close()
    shutil.rmtree(runtime)


@pytest.mark.parametrize(
    ("incoming", "parameters"),
    [("tcp:127.0.0.1:0", ()), ("zstd+tcp:127.0.0.1:0", ("--param", "x-zstd-level=3"))],
    ids=["tcp", "zstd"],
)
def test_a_guest_moves_through_any_scheme_that_is_installed(
    engines: Engines, incoming: str, parameters: tuple[str, ...]
) -> None:
    options = ("stress", "--opt", "ram=16M", "--opt", "working-set=4M", "--cap", "x-journal")
    ready = engines.run("there", *options, "--incoming", incoming)
    scheme = incoming.partition(":")[0]
    (uri,) = re.findall(rf"\b{re.escape(scheme)}:\S*[^\s'\".,)]", ready)
    engines.run("here", *options)
    engines.ask("migrate", uri, "--name", "here", *parameters)
    assert json.loads(engines.ask("status", "--name", "there", "--json"))
    engines.ask("verify", "--name", "there")
    journal = engines.ask("qmp", "x-query-journal", "--name", "there")
    assert journal.count(socket.gethostname()) == 2, "the section of the other example came along"
    engines.ask("quit", "--name", "there")


def test_a_machine_and_a_section_of_the_examples_move(engines: Engines, tmp_path: Path) -> None:
    log, arrived = tmp_path / "log", tmp_path / "arrived"
    log.write_bytes(b"a line\n" * 20_000)
    machine = ("--machine", "unicorn", "--opt", "ram=1M")
    ready = engines.run("there", *machine, "--incoming", "tcp:127.0.0.1:0", "--param", f"x-file={arrived}")
    (uri,) = re.findall(r"\btcp:\S*\d", ready)
    engines.run("here", *machine, "--param", f"x-file={log}")
    engines.ask("migrate", uri, "--name", "here")
    engines.ask("verify", "--name", "there")
    assert arrived.read_bytes() == log.read_bytes()
    engines.ask("quit", "--name", "there")
