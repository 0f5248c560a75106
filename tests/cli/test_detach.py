"""`run --detach`: an engine in the background, its log, and cleaning up if it does not start."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.hosting.log import trim
from tests.cli.conftest import SMALL, Engines
from tests.helpers.cli import MIGFW, TIMEOUT, environment, launch, migfw, start
from tests.helpers.qemu import wait_until

SLOW = """
import time
from corefw_machine_python import guest

class Slow(guest.Program):
    def setup(self):
        print("setting up", flush=True)
        time.sleep(600)

    def tick(self):
        time.sleep(0.01)
"""


class Detached:
    """Starts detached engines that share a runtime folder."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return migfw("run", "--detach", *arguments, runtime=self.runtime)

    def engines(self) -> list[dict[str, str]]:
        listed: list[dict[str, str]] = json.loads(migfw("ps", "--json", runtime=self.runtime).stdout)
        return listed

    def left(self) -> list[str]:
        return sorted(path.name for path in (self.runtime / "migfw").glob("*"))


@pytest.fixture
def detached(engines: Engines) -> Iterator[Detached]:
    made = Detached(engines.runtime)
    yield made
    for one in made.engines():
        migfw("quit", "--name", one["name"], runtime=engines.runtime)


def test_it_goes_on_in_the_background(detached: Detached) -> None:
    done = detached(*SMALL)
    where = f"unix:{detached.runtime}/migfw/stress.qmp"
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"migfw: 'stress', QMP at {where}; the guest is running\n",
        "",
    )
    [engine] = detached.engines()
    log = Path(engine["log"])
    assert engine["guest"] == "running"
    assert (log, stat.S_IMODE(log.stat().st_mode)) == (detached.runtime / "migfw" / "stress.log", 0o600)
    assert re.search(rf"^log: +{log}$", migfw("status", runtime=detached.runtime).stdout, re.M)
    assert log.read_text() == done.stdout
    pid = int(engine["pid"])
    assert os.getsid(pid) == pid
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path(os.devnull)
    assert Path(f"/proc/{pid}/cwd").readlink() == Path.cwd()
    assert migfw("quit", runtime=detached.runtime).returncode == 0
    assert detached.engines() == []


def test_a_destination_listens_when_the_command_returns(detached: Detached) -> None:
    done = detached(*SMALL, "--json", "--incoming", "tcp:127.0.0.1:0")
    facts = json.loads(done.stdout)
    assert (facts["name"], done.stderr) == ("stress", "")
    source = json.loads(detached(*SMALL, "--json").stdout)
    moved = migfw("migrate", facts["incoming-uri"], "--name", source["name"], runtime=detached.runtime)
    assert (moved.returncode, moved.stderr) == (0, "")
    assert migfw("verify", "--name", facts["name"], runtime=detached.runtime).returncode == 0
    assert "the guest has arrived" in Path(facts["log"]).read_text()


@pytest.mark.parametrize("prealloc", ["on", "off"])
def test_a_destination_allocates_its_ram_while_it_waits(detached: Detached, prealloc: str) -> None:
    large = ("stress", "--opt=ram=128M", "--opt=dirty-rate=1M")
    setting = f"--param=x-migfw-prealloc={prealloc}"
    here = json.loads(detached(*large, setting, "--json", "--incoming", "tcp:127.0.0.1:0").stdout)

    def allocation() -> dict[str, object]:
        status = json.loads(migfw("status", "--json", "--name", here["name"], runtime=detached.runtime).stdout)
        found: dict[str, object] = status["preallocation"]
        return found

    assert allocation()["total"] == 128 << 20
    wait_until(lambda: not allocation()["running"], "the allocation")
    assert (allocation()["allocated"] == 128 << 20) is (prealloc == "on")
    source = json.loads(detached(*large, "--json").stdout)
    moved = migfw("migrate", here["incoming-uri"], "--name", source["name"], runtime=detached.runtime)
    assert (moved.returncode, moved.stderr) == (0, "")
    assert migfw("verify", "--name", here["name"], runtime=detached.runtime).returncode == 0


def test_what_the_guest_prints_is_in_the_log(detached: Detached, tmp_path: Path) -> None:
    program = tmp_path / "talks.py"
    program.write_text(SLOW.replace("time.sleep(600)", "pass"))
    facts = json.loads(detached(f"{program}:Slow", "--json").stdout)
    assert "setting up" in Path(facts["log"]).read_text()


def test_relative_programs_work(detached: Detached, tmp_path: Path) -> None:
    (tmp_path / "talks.py").write_text(SLOW.replace("time.sleep(600)", "pass"))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(detached.runtime)}
    command = [*MIGFW, "run", "--detach", "talks.py:Slow"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (("nosuch",), 2, "'nosuch' is not a program"),
        (("stress", "--opt", "nosuch=1"), 2, "nosuch"),
        (("stress", "--incoming", "unix:/nowhere/x"), 1, "unix:/nowhere/x"),
        ((*SMALL, "--name", "a/b"), 2, "is not a valid engine name"),
    ],
)
def test_an_engine_that_does_not_start_says_why(
    detached: Detached, arguments: tuple[str, ...], status: int, complaint: str
) -> None:
    done = detached(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert (detached.engines(), detached.left()) == ([], [])


def test_a_program_that_fails_shows_its_traceback(detached: Detached, tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text(SLOW.replace("time.sleep(600)", "raise RuntimeError('no more')"))
    done = detached(f"{program}:Slow")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("migfw: the guest ")
    assert detached.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_it_starts_leaves_nothing(detached: Detached, tmp_path: Path, number: signal.Signals) -> None:
    program = tmp_path / "slow.py"
    program.write_text(SLOW)
    command = start("run", "--detach", f"{program}:Slow", runtime=detached.runtime)
    log = detached.runtime / "migfw" / "slow.log"
    wait_until(lambda: log.exists() and "setting up" in log.read_text(), "the program's setup()")
    [engine] = detached.engines()
    command.send_signal(number)
    out, err = command.finish()
    assert (command.returncode, out, err) == (130, "", "migfw: interrupted; nothing was started\n")
    assert not Path(f"/proc/{engine['pid']}").exists()
    assert (detached.engines(), detached.left()) == ([], [])


IMPATIENT = """
import sys
from corefw.cli import main
from corefw.hosting import background
background.GRACE_SECONDS = 0.2
sys.exit(main())
"""


def test_ctrl_c_ends_an_engine_that_does_not_react_to_it(detached: Detached, tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(SLOW)
    command = launch(
        [sys.executable, "-c", IMPATIENT, "run", "--detach", f"{program}:Slow"], environment(detached.runtime)
    )
    log = detached.runtime / "migfw" / "slow.log"
    wait_until(lambda: log.exists() and "setting up" in log.read_text(), "the program's setup()")
    [engine] = detached.engines()
    os.kill(int(engine["pid"]), signal.SIGSTOP)
    command.send_signal(signal.SIGINT)
    out, err = command.finish()
    assert (command.returncode, out, err) == (130, "", "migfw: interrupted; nothing was started\n")
    assert not Path(f"/proc/{engine['pid']}").exists()


SLOW_TO_STOP = """
import pathlib, time
from corefw_machine_python import guest

FOLDER = pathlib.Path(__file__).parent

class Slow(guest.Program):
    def setup(self):
        while not (FOLDER / "go").exists():
            time.sleep(0.01)

    def tick(self):
        time.sleep(0.01)

    def before_stop(self):
        (FOLDER / "stopping").touch()
        time.sleep(600)
"""


def test_a_second_ctrl_c_ends_an_engine_that_had_just_become_ready(detached: Detached, tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(SLOW_TO_STOP)
    command = start("run", "--detach", f"{program}:Slow", runtime=detached.runtime)
    log = detached.runtime / "migfw" / "slow.log"
    wait_until(log.exists, "the engine's process")
    command.send_signal(signal.SIGSTOP)  # so that it gets the signal before it reads that the engine is ready
    (tmp_path / "go").touch()
    wait_until(lambda: "the guest is running" in log.read_text(), "the engine")
    command.send_signal(signal.SIGINT)
    command.send_signal(signal.SIGCONT)
    wait_until((tmp_path / "stopping").exists, "the program to be stopped")
    command.send_signal(signal.SIGINT)
    out, err = command.finish()
    assert (command.returncode, out, err) == (130, "", "migfw: interrupted; nothing was started\n")
    assert (detached.engines(), detached.left()) == ([], [])


def test_an_engine_that_nobody_waits_for_ends(detached: Detached, tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(SLOW.replace("time.sleep(600)", "time.sleep(3)"))
    command = start("run", "--detach", f"{program}:Slow", runtime=detached.runtime)
    log = detached.runtime / "migfw" / "slow.log"
    wait_until(lambda: log.exists() and "setting up" in log.read_text(), "the program's setup()")
    command.kill()
    command.finish()
    wait_until(lambda: detached.engines() == [], "the engine to end")


def test_the_log_can_be_kept_elsewhere(detached: Detached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    facts = json.loads(detached(*SMALL, "--json").stdout)
    assert facts["log"] == str(tmp_path / "migfw" / "stress.log")


def test_two_engines_never_share_a_log(detached: Detached) -> None:
    logs = {
        json.loads(detached(*SMALL, "--json", "--qmp", f"unix:{detached.runtime}/{number}").stdout)["log"]
        for number in range(2)
    }
    assert len(logs) == 2
    for number in range(2):
        assert migfw("quit", "--qmp", f"unix:{detached.runtime}/{number}").returncode == 0


def test_old_logs_are_deleted_but_for_those_of_engines_that_run(detached: Detached) -> None:
    logs = [Path(json.loads(detached(*SMALL, "--json", f"--name={name}").stdout)["log"]) for name in ("ended", "runs")]
    assert migfw("quit", "--name=ended", runtime=detached.runtime).returncode == 0
    recent = logs[0].with_name("recent.log")
    recent.touch()
    for log in logs:
        os.utime(log, (0, 0))
    assert detached(*SMALL).returncode == 0
    assert detached.left() == ["recent.log", "runs.log", "runs.qmp", "stress.log", "stress.qmp"]


def test_a_long_log_keeps_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        os.write(fd, b"".join(b"line %d\n" % number for number in range(1000)))
        trim(fd, limit=4096)
        os.write(fd, b"and on\n")
    finally:
        os.close(fd)
    text = path.read_text()
    assert len(text) < 4096
    assert text.endswith("line 999\nand on\n")
    assert text.startswith("(the log was longer; this is its end)\nline ")
