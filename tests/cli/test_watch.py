"""`migfw status --watch`, on a terminal and on a pipe."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

from tests.cli.conftest import SMALL, Engine, Engines
from tests.cli.test_migrate import SLOW, pair
from tests.helpers.cli import MIGFW, TIMEOUT, check_refused, environment, start

__all__ = ["pair"]  # a fixture


def read_until(descriptor: int, text: str) -> str:
    seen, end = b"", time.monotonic() + TIMEOUT
    while text not in seen.decode(errors="replace"):
        assert time.monotonic() < end, f"no {text!r} in {seen!r}"
        if select.select([descriptor], [], [], 1)[0]:
            seen += os.read(descriptor, 1 << 16)
    return seen.decode(errors="replace")


def test_lines_follow_a_migration_until_the_engine_ends(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    watching = start("status", "--watch", "--name=here", runtime=here.runtime)
    assert watching.stdout is not None
    first = watching.stdout.readline()
    assert first.startswith("guest running; writes ")
    again = watching.stdout.readline()
    assert again.split()[3] != first.split()[3], "the fields of a guest that runs"
    assert here.call("migrate", there.uri, "--param=max-bandwidth=500K").returncode == 0
    out, err = watching.communicate(timeout=TIMEOUT)
    assert (watching.returncode, err) == (0, "migfw: the engine has ended\n")
    assert "migration active, pass 1, " in out
    assert " MiB left" in out
    assert len(out.splitlines()) > 1


def test_ctrl_c_ends_it_and_nothing_else(engines: Engines) -> None:
    here = engines(*SMALL, "--name=here")
    watching = start("status", "--watch", runtime=here.runtime)
    assert watching.stdout is not None
    watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=TIMEOUT)
    assert (watching.returncode, err) == (130, "")
    assert here.ask("query-status")["running"]


def watch_on_a_terminal(runtime: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*MIGFW, "status", "--watch", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env={**environment(runtime), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )
    os.close(terminal)
    return process, controller


def test_a_terminal_shows_it_in_place(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    watching, controller = watch_on_a_terminal(here.runtime, "--name=here")
    try:
        read_until(controller, "guest:")
        assert here.call("migrate", there.uri, SLOW, "--detach").returncode == 0
        shown = read_until(controller, "running for")
        assert "active, pass 1" in shown
        watching.send_signal(signal.SIGINT)
        rest = read_until(controller, "\x1b[?25h")
        assert "Traceback" not in rest
        assert watching.wait(TIMEOUT) == 130
    finally:
        watching.kill()
        watching.wait()
        os.close(controller)


def test_one_document_and_going_on_do_not_go_together(engine: Engine) -> None:
    check_refused({("status", "--watch", "--json"): "use one of them"}, (), engine.runtime)
