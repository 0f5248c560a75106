"""`migfw migrate` between two engines: what it prints and sets, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from corefw.cli.migrate import migrate
from corefw.client.changes import Changes
from corefw.qmp.client import QmpClient
from corefw.qmp.engines import EngineClient
from tests.cli.conftest import SMALL, Engine, Engines, Terminal
from tests.helpers.cli import TIMEOUT, Command, check_refused, start
from tests.helpers.engines import answer_pings
from tests.helpers.qemu import wait_until

SLOW = "--param=max-bandwidth=10K"
"""At this rate the guest of SMALL takes a minute and more: long enough to interfere, also on a busy machine."""


@pytest.fixture
def pair(engines: Engines) -> tuple[Engine, Engine]:
    """A source and a waiting destination."""
    made: list[Engine] = []
    starting = threading.Thread(
        target=lambda: made.append(engines(*SMALL, "--name=there", "--incoming=tcp:127.0.0.1:0"))
    )
    starting.start()
    here = engines(*SMALL, "--name=here")
    starting.join()
    return here, made[0]


def begin(here: Engine, *arguments: str) -> Command:
    """Start `migfw migrate`, and wait until the migration is under way."""
    process = start("migrate", *arguments, "--name", here.name, runtime=here.runtime)
    wait_until(lambda: status(here) not in ("none", "setup"), "the migration to begin")
    return process


def status(engine: Engine) -> str:
    answer: dict[str, str] = engine.ask("query-migrate")
    return answer.get("status", "none")


def setting(engine: Engine, name: str) -> object:
    settings = engine.ask("x-migfw-status")["settings"]
    return {**settings["capabilities"], **settings["parameters"]}[name]


def test_the_guest_moves_and_its_old_engine_goes(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    done = here.call("migrate", there.uri)
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert facts["status"].strip() == "completed"
    assert {"total time", "downtime", "throughput", "passes", "sent", "pages"} <= facts.keys()
    assert here.finish() == (0, "migfw: the guest has moved\n", "")
    verified = there.call("verify")
    assert verified.returncode == 0
    assert verified.stdout.endswith("verified: ok\n")
    assert there.process.stdout is not None
    assert there.process.stdout.readline() == "migfw: the guest has arrived, and is running\n"


def test_the_only_copy_that_is_known_stays(engines: Engines) -> None:
    here = engines(*SMALL, "--name=here")
    assert here.call("migrate", "exec:cat >/dev/null").returncode == 0
    assert here.process.stdout is not None
    assert here.process.stdout.readline().startswith("migfw: the guest was sent, but nothing confirmed its arrival")
    assert here.call("cont").returncode == 0
    assert here.call("verify").returncode == 0
    assert here.call("migrate", f"file:{here.runtime}/stream").returncode == 0
    assert here.finish() == (0, "migfw: the guest has moved\n", "")


def test_json_is_one_document_and_nothing_else(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    done = here.call("migrate", there.uri, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["status"], document["uri"]) == ("completed", there.uri)
    assert document["ram"]["remaining"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_and_the_guest_goes_on(pair: tuple[Engine, Engine], number: signal.Signals) -> None:
    here, there = pair
    process = begin(here, there.uri, SLOW)
    # The first is a default of the command line; the second was given by the user, so it wins.
    assert setting(here, "return-path") is True
    assert setting(here, "max-bandwidth") == 10 << 10
    process.send_signal(number)
    out, err = process.finish()
    assert process.returncode == 130
    assert err == "migfw: cancelled; the guest is running here\n"
    assert "cancelling; press Ctrl-C again to exit at once" in out
    assert status(here) == "cancelled"
    assert there.finish()[0] == 1


def test_a_second_ctrl_c_leaves_at_once(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    process = begin(here, there.uri, SLOW)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    process.finish()
    assert process.returncode in (130, -signal.SIGINT)  # the last signal may come after Python has removed its handlers


def test_somebody_elses_cancel_is_a_failure(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    process = begin(here, there.uri, SLOW, "--json")
    assert here.call("cancel").stdout == "migration: cancelled; the guest is running\n"
    out, err = process.finish()
    assert (process.returncode, json.loads(out)["status"]) == (1, "cancelled")
    assert err == f"migfw: the migration to {there.uri} was cancelled; the guest is running here\n"


@pytest.fixture
def swallower() -> Iterator[tuple[str, threading.Event]]:
    """A destination that answers PINGs, reads everything and never confirms: its URI, and whether it has everything."""
    took_all = threading.Event()

    def swallow() -> None:
        peer, _ = listening.accept()
        end = b""
        with peer, contextlib.suppress(ConnectionError):
            answer_pings(peer)
            while data := peer.recv(1 << 20):
                end = (end + data)[-3:]
                if end == b"}]}":  # of the description
                    took_all.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=swallow, daemon=True).start()
        yield f"tcp:127.0.0.1:{listening.getsockname()[1]}", took_all


@pytest.mark.parametrize("by", ["cancel", "ctrl-c"])
def test_a_cancel_that_cannot_know_who_has_the_guest_says_so(
    engines: Engines, swallower: tuple[str, threading.Event], by: str
) -> None:
    uri, took_all = swallower
    here = engines(*SMALL)
    process = begin(here, uri)
    assert took_all.wait(TIMEOUT)
    assert here.ask("query-status")["status"] == "finish-migrate"
    told = "; the destination had everything and may be running the guest, so it stays stopped here"
    if by == "cancel":
        done = here.call("cancel")
        assert (done.returncode, done.stdout.count("\n")) == (0, 1)
        assert done.stdout.startswith("migration: cancelled (")
        assert told in done.stdout
        assert done.stdout.endswith("; the guest is postmigrate\n")
    else:
        process.send_signal(signal.SIGINT)
    _, err = process.finish()
    assert process.returncode == (1 if by == "cancel" else 130)
    assert told in err
    assert err.endswith("; the guest is postmigrate here\n")


def test_an_engine_that_dies_is_a_failure(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    process = begin(here, there.uri, SLOW)
    here.process.kill()
    _, err = process.finish()
    assert (process.returncode, err.count("\n")) == (1, 1)
    assert err.startswith("migfw: the engine ended while its guest migrated (")
    assert there.finish()[0] == 1


def test_detached_it_can_be_watched_and_hurried(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    done = here.call("migrate", there.uri, SLOW, "--detach")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    wait_until(lambda: "active, pass" in here.call("status").stdout, "the first pass")
    again = here.call("migrate", there.uri)
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert "in progress" in again.stderr
    assert here.call("set", "max-bandwidth=0").returncode == 0
    assert here.finish() == (0, "migfw: the guest has moved\n", "")


def test_before_the_switchover_it_says_what_to_do(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    process = start(*("migrate", there.uri, "--name", here.name, "--cap=pause-before-switchover"), runtime=here.runtime)
    assert process.stdout is not None
    assert any(
        "the guest is stopped before the switchover: 'migfw continue' or 'migfw cancel'" in line
        for line in process.stdout
    )
    assert status(here) == "pre-switchover"
    assert here.call("continue").stdout == "the migration continues\n"
    _, err = process.finish()
    assert (process.returncode, err) == (0, "")


def test_a_source_that_stays_can_be_asked(engines: Engines) -> None:
    there = engines(*SMALL, "--name=there", "--incoming=tcp:127.0.0.1:0")
    here = engines(*SMALL, "--name=here", "--stay")
    assert here.call("migrate", there.uri).returncode == 0
    assert "guest:         postmigrate" in here.call("status").stdout
    refused = here.call("cont")
    assert refused.returncode != 0
    assert refused.stderr == "migfw: the guest has moved: the destination confirmed it\n"


def test_nobody_there_is_a_failure_and_the_guest_goes_on(engines: Engines) -> None:
    here = engines(*SMALL)
    done = here.call("migrate", "unix:/nonexistent/socket")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "/nonexistent/socket" in done.stderr
    assert done.stderr.endswith("; the guest is running here\n")
    document = json.loads(here.call("migrate", "unix:/nonexistent/socket", "--json").stdout)
    assert document["status"] == "failed"


def test_a_uri_of_several_lines_breaks_none(engines: Engines) -> None:
    here = engines(*SMALL)
    done = here.call("migrate", "file:/nonexistent/new\nline")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    told = here.call("status").stdout.splitlines()
    assert all(re.match(r"[A-Za-z -]+: ", line) for line in told), told
    assert any("/nonexistent/new line" in line for line in told)


def test_without_a_return_path_it_is_left_off(engines: Engines, tmp_path: object) -> None:
    here = engines(*SMALL, "--stay")
    assert here.call("set", "return-path=on").returncode == 0
    done = here.call("migrate", f"file:{tmp_path}/stream")
    assert (done.returncode, done.stderr) == (0, "")
    assert setting(here, "return-path") is False
    there = engines(*SMALL, "--name=there", f"--incoming=file:{tmp_path}/stream")
    assert there.call("verify").returncode == 0


def test_a_terminal_gets_a_live_display(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    with Terminal(here.runtime, "migrate", there.uri, "--name", here.name, SLOW) as terminal:
        seen = terminal.read_until("active, pass 1")
        assert here.call("set", "max-bandwidth=0").returncode == 0
        seen += terminal.read_all()
        assert terminal.process.wait(TIMEOUT) == 0
    assert "\x1b[?25l" in seen  # the cursor is hidden while the display is live
    assert seen.rindex("\x1b[?25h") > seen.index("\x1b[?25l")  # and shown again
    assert "completed" in seen


def test_fd_means_a_descriptor_of_the_engine(pair: tuple[Engine, Engine]) -> None:
    """It does not mean a descriptor of the command with that number or name."""
    here, there = pair
    host, _, port = there.uri.removeprefix("tcp:").rpartition(":")
    with QmpClient(here.address) as client, socket.create_connection((host, int(port))) as sock:
        client.execute("getfd", {"fdname": "out"}, [sock.fileno()])
    done = here.call("migrate", "fd:out", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["status"] == "completed"
    assert there.ask("query-status")["status"] == "running"


WRONG = {
    ("nonsense",): "is not a migration URI",
    ("carrier-pigeon:x",): "no installed plugin has the scheme 'carrier-pigeon'",
    ("tpc:localhost:1",): "(did you mean tcp?)",
    ("tcp://localhost:1",): "tcp: takes no //, expected tcp:localhost:1",
    ("fd:999",): "descriptor 999 is not open in process",
    ("fd:nobody",): "no descriptor is called 'nobody'",
    ("tcp:localhost",): "has no port",
    ("tcp:localhost:70000",): "'70000' is not a port",
    ("tcp:127.0.0.1:0",): "'tcp:127.0.0.1:0': port 0 is only for listening",
    ("zmq:tcp://*:0",): "port 0 is only for listening",
    ("ssh://host/tcp:localhost:0",): "port 0 is only for listening",
    ("tcp:localhost:1", "--cap", "levitate"): "unknown capability 'levitate'",
    ("tcp:localhost:1", "--cap", "xbzrle"): "capability 'xbzrle' is not supported by any installed plugin",
    ("tcp:localhost:1", "--cap", "events=perhaps"): "expected events=on or events=off",
    ("tcp:localhost:1", "--param", "altitude=3"): "unknown parameter 'altitude'",
    ("tcp:localhost:1", "--param", "max-bandwidth=fast"): "expects bytes per second",
    ("tcp:localhost:1", "--param", "downtime-limit=9h"): "expects a time in milliseconds",
    ("tcp:localhost:1", "--resume"): "no paused migration",
    ("tcp:localhost:1", "--resume", "--cap", "postcopy-preempt"): "--cap: a migration resumes with the settings",
    ("tcp:localhost:1", "--resume", "--postcopy"): "leave --postcopy out",
    ("--to", "other", "--resume"): "--resume needs the one that has the guest: give its URI",
    ("exec:cat >/dev/null", "--cap", "return-path"): "has no return path",
    ("defer",): "is not a migration URI",
    ("file:/tmp/\udcff",): "'file:/tmp/\\xff' is not a migration URI: a URI has to be UTF-8",
}

NOBODY = {
    (): "no engine is running: start one with 'migfw run'",
    ("--name", "nobody"): "no engine named 'nobody' is running",
    ("--qmp", "unix:/nonexistent"): "no migfw or QEMU answers at unix:/nonexistent",
    ("--qmp", "tcp:127.0.0.1:1"): "no migfw or QEMU answers at tcp:127.0.0.1:1",
    ("--qmp", "/run/socket"): "is not a QMP address",
    ("--qmp", "unix:/x", "--name", "x"): "use one of them",
}


def test_wrong_usage_is_one_line_and_starts_nothing(engine: Engine) -> None:
    check_refused(WRONG, ("migrate", "--name", engine.name), engine.runtime)
    assert status(engine) == "none"


def test_a_refused_migration_leaves_the_settings_alone(engines: Engines) -> None:
    here = engines(*SMALL)
    assert here.call("set", "downtime-limit=77ms").returncode == 0
    before = here.ask("x-migfw-status")["settings"]
    refused = here.call(
        "migrate", "exec:cat >/dev/null", *("--cap=return-path", "--cap=events", "--param=downtime-limit=88")
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "has no return path" in refused.stderr
    assert here.ask("x-migfw-status")["settings"] == before


@contextlib.contextmanager
def client_of(engine: Engine) -> Iterator[EngineClient]:
    with QmpClient(engine.address) as client:
        yield EngineClient(client)


def test_what_ends_before_it_began_leaves_the_settings_alone(engines: Engines) -> None:
    here = engines(*SMALL)
    before = here.ask("x-migfw-status")["settings"]
    changes = Changes({"events": True}, {"downtime-limit": 88})
    with client_of(here) as client, pytest.raises(KeyboardInterrupt), changes.applied(client):
        assert setting(here, "events") is True
        assert setting(here, "downtime-limit") == 88
        raise KeyboardInterrupt
    assert here.ask("x-migfw-status")["settings"] == before


def test_what_ends_when_it_began_leaves_the_settings_to_the_migration(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    changes = Changes({"events": True}, {"max-bandwidth": 10 << 10})
    with client_of(here) as client, pytest.raises(KeyboardInterrupt), changes.applied(client):
        client.call("migrate", uri=there.uri)
        raise KeyboardInterrupt
    assert status(here) in ("setup", "active")
    assert (setting(here, "events"), setting(here, "max-bandwidth")) == (True, 10 << 10)
    assert here.call("cancel").returncode == 0


def test_ctrl_c_before_it_began(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = engines(*SMALL)
    before = here.ask("x-migfw-status")["settings"]
    call = EngineClient.call

    def interrupted(self: EngineClient, command: str, **arguments: object) -> Any:
        if command == "query-migrate-capabilities":
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, command, **arguments)

    monkeypatch.setattr(EngineClient, "call", interrupted)
    assert migrate.main(["tcp:127.0.0.1:1", "--cap=events", "--qmp", here.address], standalone_mode=False) == 130
    assert capsys.readouterr() == ("", "migfw: cancelled before it started\n")
    assert status(here) == "none"
    assert here.ask("x-migfw-status")["settings"] == before


def test_no_engine_is_one_line(engines: Engines) -> None:
    check_refused(NOBODY, ("migrate", "tcp:localhost:1"), engines.runtime)


def test_settings_were_meant_for_a_migration_that_failed(engines: Engines) -> None:
    here = engines(*SMALL)
    before = here.ask("x-migfw-status")["settings"]
    done = here.call("migrate", "exec:exit 3", "--cap=events", "--param=downtime-limit=77ms")
    assert done.returncode == 1
    assert here.ask("x-migfw-status")["settings"] == before


def test_what_somebody_else_set_meanwhile_stays(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    before = setting(here, "max-bandwidth")
    process = begin(here, there.uri, SLOW, "--param=downtime-limit=77ms")
    assert here.call("set", "downtime-limit=99ms").returncode == 0
    assert here.call("cancel").returncode == 0
    process.finish()
    assert process.returncode == 1
    assert (setting(here, "downtime-limit"), setting(here, "max-bandwidth")) == (99, before)
