"""`migfw status --watch`, on a terminal and on a pipe."""

from __future__ import annotations

import signal

from tests.cli.conftest import SMALL, Engine, Engines, Terminal
from tests.cli.test_migrate import SLOW, pair
from tests.helpers.cli import TIMEOUT, check_refused, start

__all__ = ["pair"]  # a fixture


def test_lines_follow_a_migration_until_the_engine_ends(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    watching = start("status", "--watch", "--name=here", runtime=here.runtime)
    assert watching.stdout is not None
    lines = iter(watching.stdout.readline, "")
    first = next(lines)
    assert first.startswith("guest running; writes ")
    assert any(line.split()[3] != first.split()[3] for line in lines), "the fields of a guest that runs"
    assert here.call("migrate", there.uri, SLOW, "--detach").returncode == 0
    assert any("migration active, pass 1, " in line and " MiB left" in line for line in lines)
    assert here.call("set", "max-bandwidth=0").returncode == 0
    _, err = watching.finish()
    assert (watching.returncode, err) == (0, "migfw: the engine has ended\n")


def test_ctrl_c_ends_it_and_nothing_else(engines: Engines) -> None:
    here = engines(*SMALL, "--name=here")
    watching = start("status", "--watch", runtime=here.runtime)
    assert watching.stdout is not None
    watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, err = watching.finish()
    assert (watching.returncode, err) == (130, "")
    assert here.ask("query-status")["running"]


def test_a_terminal_shows_it_in_place(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    with Terminal(here.runtime, "status", "--watch", "--name=here") as watching:
        watching.read_until("guest:")
        assert here.call("migrate", there.uri, SLOW, "--detach").returncode == 0
        watching.read_until("active, pass 1")
        watching.read_until("running for")
        watching.process.send_signal(signal.SIGINT)
        assert "Traceback" not in watching.read_until("\x1b[?25h")
        assert watching.process.wait(TIMEOUT) == 130


def test_one_document_and_going_on_do_not_go_together(engine: Engine) -> None:
    check_refused({("status", "--watch", "--json"): "use one of them"}, (), engine.runtime)
