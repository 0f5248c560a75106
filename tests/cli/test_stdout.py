"""A stdout that is full or closed: one line if output is lost, and never a traceback."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL, Engines
from tests.helpers.cli import MIGFW, TIMEOUT, environment

FULL = "migfw: cannot write to stdout: no space left on device"


def call(redirection: str, *arguments: str, runtime: Path) -> tuple[int, str]:
    """Run migfw with this redirection: its status and stderr."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *MIGFW, *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(runtime),
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [("plugins",), ("plugins", "--json"), ("--help",), ("run", "--help"), ("ps",)])
def test_what_is_there_to_be_read(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert call(">/dev/full", *arguments, runtime=tmp_path) == (1, f"{FULL}\n")
    assert call(">&-", *arguments, runtime=tmp_path) == (0, "")
    assert call(">&- <&- 2>&-", *arguments, runtime=tmp_path) == (0, "")


def test_a_migration_goes_on_and_its_end_is_told(engines: Engines, tmp_path: Path) -> None:
    here = engines(*SMALL, "--stay")
    migrate = ("migrate", "--name", here.name)
    uri = f"file:{tmp_path}/nowhere/stream"
    status, err = call(">/dev/full", *migrate, uri, "--json", runtime=here.runtime)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"{FULL}; the migration failed: {uri}: ")
    assert err.endswith("; the guest is running here\n")
    uri = f"file:{tmp_path}/stream"
    assert call(">/dev/full", *migrate, uri, runtime=here.runtime) == (0, f"{FULL}; the guest has moved\n")
    assert here.ask("query-migrate")["status"] == "completed"
    assert call(">/dev/full", "inspect", f"{tmp_path}/stream", "--json", runtime=here.runtime) == (1, f"{FULL}\n")


def test_a_detached_migration_is_told(engines: Engines, tmp_path: Path) -> None:
    here = engines(*SMALL, "--stay")
    command = ("migrate", "--name", here.name, f"file:{tmp_path}/stream", "--detach")
    told = f"{FULL}; migrating to file:{tmp_path}/stream\n"
    assert call(">/dev/full", *command, runtime=here.runtime) == (0, told)


def test_with_a_closed_stdout_it_works_in_silence(engines: Engines, tmp_path: Path) -> None:
    here = engines(*SMALL)
    assert call(">&-", "migrate", "--name", here.name, f"file:{tmp_path}/stream", runtime=here.runtime) == (0, "")


def test_a_relay_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    relay = ("relay", f"file:{tmp_path}/in", f"file:{tmp_path}/out")
    assert call(">/dev/full", *relay, runtime=tmp_path) == (0, f"{FULL}; relayed 1 B\n")
    assert (tmp_path / "out").read_bytes() == b"x"


@pytest.mark.parametrize(("redirection", "told"), [(">/dev/full", f"{FULL}\n"), (">&-", "")])
def test_a_guest_runs_on(redirection: str, told: str, tmp_path: Path) -> None:
    program = tmp_path / "short.py"
    program.write_text(
        "from corefw_machine_python import guest\n\n"
        "class Short(guest.Program):\n    def tick(self):\n        self.finish()\n"
    )
    assert call(redirection, "run", f"{program}:Short", runtime=tmp_path) == (0, told)
