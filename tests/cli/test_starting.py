"""The start of an engine: its name, its QMP socket, and Ctrl-C at any moment."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL, Engines
from tests.helpers.cli import environment, launch, migfw, start
from tests.helpers.qemu import wait_until


def test_engines_started_together_get_names_of_their_own(engines: Engines) -> None:
    """Start four at once, three times: each gets a name, in whatever order they look for one."""
    for _ in range(3):
        commands = [start("run", *SMALL, runtime=engines.runtime) for _ in range(4)]
        try:
            lines = [command.stdout.readline() for command in commands if command.stdout]
        finally:
            for command in commands:
                command.send_signal(signal.SIGTERM)
                command.finish()
        names = sorted(line.split("'")[1] for line in lines)
        assert names == ["stress", "stress-2", "stress-3", "stress-4"]
        assert engines.sockets() == []


def test_whoever_waits_for_the_socket_may_migrate(engines: Engines) -> None:
    """The QMP socket of a destination appears when it listens for the guest, not before."""
    source = engines(*SMALL, "--name", "source")
    destination = start("run", *SMALL, "--incoming", f"unix:{engines.runtime}/in", runtime=engines.runtime)
    try:
        socket = engines.runtime / "migfw" / "stress.qmp"
        wait_until(socket.exists, "the QMP socket")
        assert (engines.runtime / "in").exists()
        assert source.call("migrate", f"unix:{engines.runtime}/in").returncode == 0
    finally:
        destination.send_signal(signal.SIGTERM)
        destination.finish()


def test_deferred_it_can_be_asked_at_once(engines: Engines) -> None:
    destination = engines(*SMALL, "--incoming", "defer")
    assert destination.call("qmp", "migrate-incoming", f"uri=unix:{engines.runtime}/in").returncode == 0
    assert engines(*SMALL, "--name", "source").call("migrate", f"unix:{engines.runtime}/in").returncode == 0


def test_a_signal_that_another_thread_receives_ends_it(engines: Engines) -> None:
    """As one that arrives just before the main thread goes to sleep: no system call of that is interrupted."""
    engine = engines(*SMALL)
    main = engine.process.pid
    other = sorted(int(task.name) for task in Path(f"/proc/{main}/task").iterdir())[1]  # the first: it lives as long
    assert ctypes.CDLL(None).tgkill(main, other, signal.SIGTERM) == 0
    assert engine.finish()[0] == 0


SCRIPT = """
import sys
from corefw.cli import main
print("here", flush=True)
sys.exit(main())
"""
"""The script that pip creates for the entry point, with a line printed once the package is imported. Ctrl-C before that
is up to Python."""


@pytest.mark.parametrize("command", ["run", "detach", "migrate", "status", "--help"])
def test_ctrl_c_at_any_moment_is_no_traceback(engines: Engines, tmp_path: Path, command: str) -> None:
    arguments = {
        "run": ("run", *SMALL),
        "detach": ("run", *SMALL, "--detach"),
        "migrate": ("migrate", "tcp:127.0.0.1:1"),
        "status": ("status",),
        "--help": ("--help",),
    }[command]
    script = tmp_path / "migfw"
    script.write_text(SCRIPT)
    for milliseconds in range(0, 400, 40):
        process = launch([sys.executable, script, *arguments], environment(engines.runtime))
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        out, err = process.finish()
        assert "Traceback" not in err, err
        # -SIGINT: the interpreter was shutting down and had removed our handler. A shell reports 130 for that, too.
        ended_before = process.returncode in (0 if command in ("--help", "detach") else 2, -signal.SIGINT)
        assert process.returncode == 130 or (ended_before and (out or err)), (milliseconds, process.returncode, err)
        if command == "detach" and process.returncode == 0:
            assert migfw("quit", runtime=engines.runtime).returncode == 0
        else:
            assert [name for name in engines.sockets() if not name.endswith(".log")] == []
