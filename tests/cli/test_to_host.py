"""`migfw migrate --to HOST`, over a real sshd on this host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw import __version__
from tests.cli.conftest import SMALL, Engine, Engines
from tests.helpers.cli import migfw, start
from tests.helpers.qemu import wait_until
from tests.helpers.sshd import Sshd, running_sshd

BUSY = """
from corefw_machine_python import guest

class Busy(guest.Program):
    data = guest.array("data", shape=(65536,), dtype="uint8")
    ticks = guest.field("u64")

    def tick(self):
        self.data[self.ticks % 65536] += 1
        self.ticks += 1
"""


class Far:
    """A destination host: `sshd` on loopback. Engines started through it have their sockets in `runtime`."""

    def __init__(self, sshd: Sshd, runtime: Path) -> None:
        self.sshd = sshd
        self.runtime = runtime

    @property
    def to(self) -> str:
        return f"--to={self.sshd.address}"

    def engines(self) -> list[dict[str, str]]:
        listed: list[dict[str, str]] = json.loads(migfw("ps", "--json", runtime=self.runtime).stdout)
        return listed

    def wait_empty(self) -> None:
        wait_until(lambda: not self.engines(), "the engines on the other host to end")


@pytest.fixture(scope="module")
def sshd_and_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    runtime = Path(tempfile.mkdtemp(prefix="migfw-far-", dir="/tmp"))
    with running_sshd(tmp_path_factory.mktemp("sshd"), f"SetEnv XDG_RUNTIME_DIR={runtime}") as sshd:
        yield Far(sshd, runtime)
    shutil.rmtree(runtime)


@pytest.fixture
def far(sshd_and_runtime: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    monkeypatch.setenv("HOME", str(sshd_and_runtime.sshd.make_home(tmp_path / "home")))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    yield sshd_and_runtime
    for one in sshd_and_runtime.engines():
        migfw("quit", "--name", one["name"], runtime=sshd_and_runtime.runtime)


def test_one_command_for_both_sides(far: Far, engines: Engines) -> None:
    source = engines(*SMALL)
    done = source.call("migrate", far.to)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{far.sshd.address}, engine 'stress', log {far.runtime}/migfw/stress.log" in done.stdout
    assert source.finish()[0] == 0
    [there] = far.engines()
    assert there["guest"] == "running"
    assert migfw("verify", runtime=far.runtime).returncode == 0
    assert not (far.runtime / "migfw" / "stress.in").exists()


def test_settings_go_along(far: Far, engines: Engines) -> None:
    source = engines(*SMALL, "--only-migratable", "--cap=events")
    done = source.call("migrate", far.to, "--param=downtime-limit=77ms", "--cap=pause-before-switchover=off")
    assert (done.returncode, done.stderr) == (0, "")
    there = json.loads(migfw("status", "--json", runtime=far.runtime).stdout)
    assert there["settings"]["parameters"]["downtime-limit"] == 77
    assert there["launch"]["properties"] == {"only-migratable": True}


def test_as_json(far: Far, engines: Engines) -> None:
    document = json.loads(engines(*SMALL).call("migrate", far.to, "--json").stdout)
    assert document["status"] == "completed"
    assert document["destination"]["name"] == "stress"
    assert document["uri"] == f"ssh://{far.sshd.address}/unix:{far.runtime}/migfw/stress.in"


def test_a_relative_program_is_looked_for_where_it_is_here(
    far: Far, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    assert engines("busy.py:Busy").call("migrate", far.to).returncode == 0
    [there] = far.engines()
    assert there["guest"] == "running"


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_a_program_that_is_not_there(
    far: Far, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Source and destination are the same host here, so the program is deleted once it runs."""
    folder = tmp_path / "sims"
    folder.mkdir()
    (folder / "busy.py").write_text(BUSY)
    monkeypatch.chdir(folder)
    source = engines("busy.py:Busy")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(folder)
    if gone == "file":
        folder.mkdir()
    done = source.call("migrate", far.to)
    complaint = f"has no '{folder}/busy.py': copy" if gone == "file" else f"has no directory '{folder}'"
    _refused(far, source, done.returncode, done.stderr, complaint)


def test_no_migfw_there(far: Far, engines: Engines) -> None:
    source = engines(*SMALL)
    done = source.call("migrate", far.to, "--remote-migfw", "/nowhere/migfw")
    _refused(far, source, done.returncode, done.stderr, "'/nowhere/migfw' is not there")


def test_another_version_there(far: Far, engines: Engines, tmp_path: Path) -> None:
    other = tmp_path / "migfw"
    other.write_text("#!/bin/sh\necho migfw 99.0\n")
    other.chmod(0o755)
    source = engines(*SMALL)
    done = source.call("migrate", far.to, "--remote-migfw", str(other))
    _refused(far, source, done.returncode, done.stderr, f"no migfw {__version__}", f"'{other}' is migfw 99.0")


def test_a_host_that_is_not_known(far: Far, engines: Engines) -> None:
    known = Path(os.environ["HOME"], ".ssh", "known_hosts")
    known.write_text("")
    source = engines(*SMALL)
    done = source.call("migrate", far.to)
    _refused(far, source, done.returncode, done.stderr, "the host key of", "is not known")


def test_what_the_engine_refuses_ends_the_destination(far: Far, engines: Engines) -> None:
    source = engines(*SMALL)
    done = source.call("migrate", far.to, "--param", "downtime-limit=-1")
    assert done.returncode == 2
    assert migfw("qmp", "query-status", "--name", source.name, runtime=engines.runtime).returncode == 0
    far.wait_empty()


def test_ctrl_c_ends_the_destination(far: Far, engines: Engines) -> None:
    source = engines("stress", "--opt=ram=64M", "--opt=working-set=64K")
    command = start("migrate", far.to, "--name", source.name, "--param", "max-bandwidth=1M", runtime=engines.runtime)
    wait_until(lambda: source.ask("query-migrate").get("status") == "active", "the migration to begin")
    command.send_signal(signal.SIGINT)
    _, err = command.finish()
    assert command.returncode == 130
    assert "the guest is running here" in err
    far.wait_empty()


def test_ctrl_c_while_the_destination_starts_leaves_nothing(far: Far, engines: Engines, tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(BUSY)
    source = engines(f"{program}:Busy")
    program.write_text(f"import time, pathlib\npathlib.Path('{tmp_path}/begun').touch()\ntime.sleep(30)\n" + BUSY)
    command = start("migrate", far.to, "--name", source.name, runtime=engines.runtime)
    wait_until((tmp_path / "begun").exists, "the destination to import its program")
    command.send_signal(signal.SIGINT)
    out, err = command.finish()
    assert (command.returncode, out, err) == (130, "", "")

    def left() -> list[Path]:
        return [path for path in (far.runtime / "migfw").glob("*") if path.suffix != ".log" or path.stem == "slow"]

    wait_until(lambda: not left(), "the destination to clean up")
    assert source.ask("query-status")["status"] == "running"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "no destination"),
        (("tcp:a:1", "--to", "b"), "use one of them"),
        (("tcp:a:1", "--remote-migfw", "/x"), "--remote-migfw needs --to"),
        (("--to", "b", "--detach"), "leave out --detach"),
        (("--to", "a/b"), "ssh://"),
    ],
)
def test_wrong_usage(engine: Engine, arguments: tuple[str, ...], complaint: str) -> None:
    done = engine.call("migrate", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_check_starts_a_destination_and_ends_it(far: Far, engines: Engines) -> None:
    source = engines(*SMALL)
    done = source.call("check", far.to, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["ok"]
    assert document["bandwidth"] > 0
    far.wait_empty()
    assert source.ask("query-status")["status"] == "running"
    assert source.ask("query-migrate").get("status") is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_check_that_is_broken_off_ends_its_destination(far: Far, engines: Engines, number: signal.Signals) -> None:
    source = engines(*SMALL)
    command = start("check", far.to, "--name", source.name, runtime=engines.runtime)
    wait_until(far.engines, "the destination to start")
    command.send_signal(number)
    out, err = command.finish()
    # The last one: the check was through, and Python had removed its handlers.
    assert (command.returncode, err) in ((130, ""), (0, ""), (-number, "")), out
    far.wait_empty()


def _refused(far: Far, source: Engine, status: int, err: str, *complaints: str) -> None:
    """There was a clear error before anything moved, and nothing is left on the other host."""
    assert (status, err.count("\n")) == (1, 1), err
    for complaint in complaints:
        assert complaint in err
    assert source.ask("query-status")["status"] == "running"
    assert source.ask("query-migrate").get("status") is None
    assert far.engines() == []
