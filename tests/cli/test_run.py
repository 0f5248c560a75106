"""`migfw run`: how an engine starts, and every way in which it ends."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL, Engines
from tests.helpers.cli import TIMEOUT, check_refused, migfw
from tests.helpers.qemu import wait_until

ENDS = """
from corefw_machine_python import guest

class Short(guest.Program):
    ticks = guest.field("u64")

    def tick(self):
        self.ticks += 1
        if self.ticks == 3:
            {ending}
"""


def test_it_says_where_it_is_and_quits(engines: Engines) -> None:
    engine = engines(*SMALL)
    assert engine.line == f"migfw: 'stress', QMP at unix:{engines.runtime}/migfw/stress.qmp; the guest is running"
    done = migfw("quit", runtime=engines.runtime)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert engine.process.poll() == 0, "the process has ended when the command returns"
    assert engine.finish() == (0, "", "")
    assert engines.sockets() == []


def test_names_are_made_from_the_program_and_numbered(engines: Engines) -> None:
    assert [engines(*SMALL).name for _ in range(2)] == ["stress", "stress-2"]
    listed = migfw("ps", runtime=engines.runtime).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["NAME", "stress", "stress-2"]
    several = migfw("status", runtime=engines.runtime)
    assert (several.returncode, several.stderr) == (
        2,
        "migfw: several engines are running: choose one with --name (stress, stress-2)\n",
    )
    taken = migfw("run", *SMALL, "--name", "stress", runtime=engines.runtime)
    assert (taken.returncode, taken.stdout) == (2, "")
    assert taken.stderr.startswith("migfw: an engine named 'stress' is already running")


def test_paused_it_waits_for_cont(engines: Engines) -> None:
    engine = engines(*SMALL, "--paused")
    assert "not started" in engine.line
    assert "prelaunch" in engine.call("status").stdout
    assert engine.call("cont").stdout == "the guest is running\n"


def test_a_reader_that_goes_away_does_not_end_the_guest(engines: Engines) -> None:
    engine = engines(*SMALL, "--incoming", f"unix:{engines.runtime}/in")
    assert engine.process.stdout is not None
    engine.process.stdout.close()
    other = engines(*SMALL, "--name", "other")
    assert other.call("migrate", f"unix:{engines.runtime}/in").returncode == 0
    assert engine.call("verify").returncode == 0  # although it could not print that the guest has arrived
    assert engine.call("quit").returncode == 0
    assert engine.process.wait(TIMEOUT) == 0


def test_ctrl_c_ends_it_in_order(engines: Engines) -> None:
    engine = engines(*SMALL)
    engine.process.send_signal(signal.SIGINT)
    assert engine.finish() == (130, "", "migfw: interrupted; ending the guest\n")
    assert engines.sockets() == []


def test_sigterm_ends_it_in_order(engines: Engines) -> None:
    engine = engines(*SMALL)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.finish() == (0, "", "")
    assert engines.sockets() == []


FAREWELL = """
import pathlib, time
from corefw_machine_python import guest

class Farewell(guest.Program):
    stop_timeout = {patience}
    def tick(self):
        pathlib.Path(__file__).with_suffix(".ticks").touch()
        time.sleep({tick})
    def before_stop(self):
        {stop}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_lets_the_guest_say_goodbye(engines: Engines, tmp_path: Path, number: signal.Signals) -> None:
    program = tmp_path / "farewell.py"
    program.write_text(FAREWELL.format(patience=10, tick=0.01, stop="print('goodbye', flush=True)"))
    engine = engines(f"{program}:Farewell")
    engine.process.send_signal(number)
    if number is signal.SIGHUP:
        engine.process.send_signal(number)  # a closing terminal sends it twice; the second one is ignored
    status, out, _ = engine.finish()
    assert (status, out) == (130 if number is signal.SIGINT else 0, "goodbye\n")
    assert engines.sockets() == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"stop": "raise RuntimeError('not now')"},
            "its before_stop() failed: RuntimeError: not now (farewell.py, line ",
        ),
        (
            {"patience": 0.2, "tick": 60, "stop": "print('never')"},
            "the guest did not stop within 0.2 s: its process is killed without before_stop() (",
        ),
    ],
)
def test_a_goodbye_that_fails_is_said(engines: Engines, tmp_path: Path, values: dict[str, object], said: str) -> None:
    program = tmp_path / "farewell.py"
    program.write_text(FAREWELL.format(**({"patience": 10, "tick": 0.01} | values)))
    engine = engines(f"{program}:Farewell")
    wait_until(program.with_suffix(".ticks").exists, "the first tick")
    engine.process.send_signal(signal.SIGTERM)
    status, out, err = engine.finish()
    assert (status, out) == (0, "")
    assert said in err.splitlines()[-1]


def test_a_hangup_under_nohup_ends_nothing(engines: Engines) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; the engine inherits it
    try:
        engine = engines(*SMALL)
    finally:
        signal.signal(signal.SIGHUP, before)
    engine.process.send_signal(signal.SIGHUP)
    assert engine.call("status").returncode == 0
    assert engine.process.poll() is None


def test_a_second_signal_ends_it_at_once(engines: Engines, tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(
        "import time\nfrom corefw_machine_python import guest\n\n"
        "class Slow(guest.Program):\n    def tick(self):\n        time.sleep(60)\n"
    )
    engine = engines(f"{program}:Slow")
    assert engine.name == "slow"
    engine.process.send_signal(signal.SIGTERM)
    while engine.process.poll() is None:
        engine.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert engine.process.returncode in (
        0,
        130,
        -signal.SIGTERM,
    )  # the last signal may come after Python has removed its handlers
    assert engines.sockets() == []


def test_it_ends_with_its_guest(engines: Engines, tmp_path: Path) -> None:
    program = tmp_path / "short.py"
    program.write_text(ENDS.format(ending="self.finish()"))
    engine = engines(f"{program}:Short")
    assert engine.finish() == (0, "migfw: the guest has ended\n", "")


def test_a_guest_that_fails_is_a_failure(engines: Engines, tmp_path: Path) -> None:
    program = tmp_path / "short.py"
    program.write_text(ENDS.format(ending="raise RuntimeError('no more')"))
    status, out, err = engines(f"{program}:Short").finish()
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("migfw: the guest failed: ")
    assert "no more" in err.splitlines()[-1]
    assert "File" in err  # the traceback of the program, for its author


LINES = """
from corefw_machine_python import guest

class Lines(guest.Program):
    def {method}(self):
        raise RuntimeError("one\\n\\ntwo")
{tick}
"""


@pytest.mark.parametrize("method", ["setup", "tick", "after_start"])
def test_why_a_guest_failed_is_said_once_and_in_one_line(engines: Engines, tmp_path: Path, method: str) -> None:
    program = tmp_path / "lines.py"
    tick = "" if method == "tick" else "    def tick(self):\n        pass\n"
    program.write_text(LINES.format(method=method, tick=tick))
    status, _, err = engines(f"{program}:Lines").finish()
    ours = [line for line in err.splitlines() if line.startswith("migfw: ")]
    assert (status, len(ours), ours[0]) == (1, 2, "migfw: the guest's program failed:")
    reason = rf"RuntimeError: one two \(lines\.py, line 6, in {method}\)"
    assert re.fullmatch(rf"migfw: the guest (failed|has ended): {reason}", ours[1])
    assert err.endswith(f"{ours[1]}\n")


def test_an_address_of_its_own(engines: Engines, tmp_path: Path) -> None:
    engine = engines(*SMALL, "--qmp", "tcp:127.0.0.1:0")
    assert engines.sockets() == []
    assert migfw("status", "--qmp", engine.address, runtime=engines.runtime).returncode == 0


def test_an_address_where_somebody_listens_is_refused(engines: Engines) -> None:
    engine = engines(*SMALL)
    done = migfw("run", *SMALL, "--qmp", engine.address, runtime=engines.runtime)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert engine.address in done.stderr
    assert engine.call("status").returncode == 0


def test_an_address_where_something_else_is_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("precious")
    done = migfw("run", *SMALL, "--qmp", f"unix:{file}", runtime=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"'unix:{file}': it exists and is not a stale socket of yours" in done.stderr
    assert file.read_text() == "precious"


def test_incoming_says_what_to_dial(engines: Engines) -> None:
    engine = engines(*SMALL, "--incoming", "tcp:127.0.0.1:0")
    assert engine.line.endswith(f"waiting for a migration at {engine.uri}")
    assert int(engine.uri.rpartition(":")[2]) > 0
    assert f"incoming:      setup at {engine.uri}" in engine.call("status").stdout
    refused = engine.call("migrate", "tcp:127.0.0.1:1")
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.parametrize("stay", [False, True])
def test_a_stream_that_is_none_fails_the_destination(engines: Engines, tmp_path: Path, stay: bool) -> None:
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"this is no migration stream")
    engine = engines(*SMALL, "--incoming", f"file:{nonsense}", *(["--stay"] if stay else []))
    if stay:
        engine.process.stderr.readline()  # type: ignore[union-attr]  # it is a pipe
        assert "failed" in engine.call("status").stdout
        engine.process.send_signal(signal.SIGTERM)
        assert engine.finish()[0] == 0
    else:
        status, _, err = engine.finish()
        assert status == 1
        assert err.startswith("migfw: the guest could not be loaded: ")
        assert err.count("\n") == 1


def test_deferred_it_waits_to_be_told(engines: Engines) -> None:
    engine = engines(*SMALL, "--incoming", "defer")
    assert "migrate-incoming" in engine.line
    assert engine.call("qmp", "migrate-incoming", "uri=tcp:127.0.0.1:0").returncode == 0
    assert "setup at tcp:127.0.0.1:" in engine.call("status").stdout


WRONG = {
    (): "which program?",
    ("nonsense",): "nonsense",
    ("nowhere.py:Class",): "nowhere.py",
    ("stress", "--machine", "abacus"): "no installed plugin has a machine 'abacus'",
    ("stress", "--opt", "ram=lots"): "ram",
    ("stress", "--opt", "colour=red"): "colour",
    ("stress", "--opt", "ram"): "'ram': expected --opt NAME=VALUE",
    ("stress", "--opt", "ram=1M", "--opt", "ram=2M"): "'ram' is given twice",
    ("stress", "--incoming", "carrier-pigeon:x"): "no installed plugin has the scheme 'carrier-pigeon'",
    ("stress", "--incoming", "tcp:localhost"): "has no port",
    ("stress", "--incoming", "tcp:localhost:http"): "'http' is not a port",
    ("stress", "--incoming", "nonsense"): "is not a migration URI",
    ("stress", "--incoming", "file:/tmp/\udcff"): "'file:/tmp/\\xff' is not a migration URI: a URI has to be UTF-8",
    ("stress", "--cap", "levitate"): "unknown capability 'levitate'",
    ("stress", "--cap", "events=perhaps"): "expected events=on or events=off",
    ("stress", "--cap", "x-colo"): "capability 'x-colo' is not supported by any installed plugin",
    ("stress", "--param", "downtime-limit=long"): "expects a time in milliseconds",
    ("stress", "--param", "altitude=3"): "unknown parameter 'altitude'",
    ("stress", "--property", "shiny=on"): "no property 'shiny'",
    ("stress", "--qmp", "pigeon:1"): "is not a QMP address",
    ("stress", "--name", "a/b"): "'a/b' is not a valid engine name",
}


def test_wrong_usage_is_one_line_and_starts_nothing(engines: Engines) -> None:
    check_refused(WRONG, ("run",), engines.runtime)
    assert engines.sockets() == []


def test_a_directory_of_somebody_elses_is_refused(engines: Engines) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a directory away")
    theirs = engines.runtime / "migfw"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    done = migfw("ps", runtime=engines.runtime)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "belongs to user 12345" in done.stderr
