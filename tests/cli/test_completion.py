"""Tab completion, through click and in a real bash on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from corefw.cli.group import migfw
from corefw.cli.options import program_classes
from tests.cli.conftest import Engine
from tests.helpers.cli import MIGFW, TIMEOUT, environment
from tests.helpers.cli import migfw as call

PROGRAM = '''
raise SystemExit("this file was imported")

class Grid:
    pass

class Heat(guest.Program):
    """A heat equation."""

class Hot(Heat):
    pass
'''


def completed(*arguments: str) -> list[str]:
    """The completions of the last argument."""
    *before, last = arguments
    return [item.value for item in ShellComplete(migfw, {}, "migfw", "_X").get_completions(before, last)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "heat.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text("class Heat(")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "sims").mkdir()
    (tmp_path / "sims" / "cold.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_programs(folder: Path) -> None:
    assert completed("run", "") == ["life", "stress", "heat.py", "sims/", "wrong.py"]
    assert completed("run", "str") == ["stress"]
    assert completed("run", "h") == ["heat.py:Heat", "heat.py:Hot"], "the only file, so its classes"
    assert completed("run", "heat.py:") == ["heat.py:Heat", "heat.py:Hot"]
    assert completed("run", "heat.py:Ho") == ["heat.py:Hot"]
    assert completed("run", "sims/") == ["sims/cold.py"]
    assert completed("run", "wrong.py:") == completed("run", "nowhere/") == []
    assert program_classes(folder / "heat.py") == [("Heat", "A heat equation."), ("Hot", "")]


def test_settings() -> None:
    assert completed("migrate", "tcp:x:1", "--cap", "ret") == ["return-path"]
    assert "xbzrle" not in completed("migrate", "tcp:x:1", "--cap", ""), "nobody implements that"
    assert completed("migrate", "tcp:x:1", "--param", "down") == ["downtime-limit="]
    assert completed("run", "stress", "--param", "x-migfw-on-timeout=") == [
        *("x-migfw-on-timeout=", "x-migfw-on-timeout=cancel", "x-migfw-on-timeout=switchover")
    ]
    assert completed("set", "ev") == ["events=on", "events=off"]
    assert completed("set", "max-b") == ["max-bandwidth="]
    assert completed("run", "--property", "only") == ["only-migratable=on", "only-migratable=off"]


def test_uris_machines_and_addresses(folder: Path) -> None:
    assert {"tcp:", "unix:", "ssh://", "zmq:", "file:"} <= set(completed("migrate", ""))
    assert "defer" not in completed("migrate", "")
    assert completed("run", "--incoming", "de") == ["defer"]
    assert completed("migrate", "file:n") == ["file:notes.txt"]
    assert completed("run", "--machine", "") == ["python", "qemu"]
    assert completed("status", "--qmp", "u") == ["unix:"]
    assert completed("status", "--qmp", "unix:s") == ["unix:sims/"]
    assert completed("stat") == ["status"]


def test_names_of_engines(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(engine.runtime))
    assert completed("status", "--name", "") == [engine.name]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts(shell: str) -> None:
    done = call("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_MIGFW_COMPLETE={shell}_complete" in done.stdout


class Terminal:
    """A bash on a terminal, with completion set up as the documentation says."""

    def __init__(self, folder: Path) -> None:
        commands = folder / "commands"
        commands.mkdir()
        script = commands / "migfw"
        script.write_text(f'#!/bin/sh\nexec {" ".join(MIGFW)} "$@"\n')
        script.chmod(0o755)
        self._controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=folder,
            env={
                **environment(folder),
                "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PS1": "ready> ",
                "COLUMNS": "300",
                "INPUTRC": "/dev/null",
            },
        )
        os.close(terminal)
        self._unread = ""
        self.read_until("ready> ")
        self.type('bind "set enable-bracketed-paste off"; eval "$(migfw completion bash)"; echo switched-"on"\n')
        self.read_until("switched-on\r\n")
        self.read_until("ready> ")

    def type(self, text: str) -> None:
        os.write(self._controller, text.encode())

    def read_until(self, text: str) -> str:
        end = time.monotonic() + TIMEOUT
        while text not in self._unread:
            assert time.monotonic() < end, f"no {text!r} in {self._unread!r}"
            if select.select([self._controller], [], [], 1)[0]:
                self._unread += os.read(self._controller, 1 << 16).decode(errors="replace")
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def complete(self, line: str, expected: str) -> None:
        """Type a line and Tab, wait for the expected line, and discard it."""
        self.type(line + "\t")
        self.read_until(expected)
        self.type("|\x15")
        self.read_until("|")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._controller)


def test_in_a_real_bash(folder: Path) -> None:
    terminal = Terminal(folder)
    try:
        terminal.complete("migfw stat", "migfw status ")
        terminal.complete("migfw run heat.py:He", "migfw run heat.py:Heat ")
        terminal.complete("migfw run si", "migfw run sims/")
        terminal.complete("migfw migrate --cap=ret", "--cap=return-path ")
        terminal.complete("migfw migrate tcp:x:1 --param downt", "--param downtime-limit=")
        terminal.complete("migfw migrate tcp:x:1 --param x-migfw-on-timeout=sw", "x-migfw-on-timeout=switchover ")
        terminal.complete("migfw migrate file:no", "migfw migrate file:notes.txt ")
        terminal.complete("migfw migrate ss", "migfw migrate ssh://")
        terminal.complete("cd . && migfw run --machine q", "--machine qemu ")
    finally:
        terminal.close()
