"""Runs a case of the matrix with real `migfw run` processes, and judges how it ended.

A case follows docs/decisions/switchover.md as a user would: while both engines live, "recover there, resume here";
`cont` on the source only if the destination cannot run the guest any more.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from corefw.errors import MigfwError
from corefw.qmp.client import QmpClient
from tests.helpers.cli import MIGFW, environment
from tests.matrix import witness
from tests.matrix.cases import SILENT, Blow, Case, Fault
from tests.matrix.points import POINTS, Stage
from tests.matrix.proxy import Cut, Proxy, Watch

PATIENCE: Final = 15.0
"""Seconds for one step, far beyond what it takes."""

LIMITS: Final = {"x-migfw-confirm-timeout": 2000, "x-migfw-incoming-timeout": 2000}
"""Milliseconds, where the fault is silence."""

STOPPED: Final = 3.0
"""Seconds that a process is stopped: more than the limits."""

REQUEST: Final = next(point.pattern for point in POINTS if point.name == "REQ_PAGES")
ENDED: Final = ("completed", "failed", "cancelled")
GUEST: Final = f"{witness.__file__}:Witness"


class Process:
    """A `migfw run`, and the guest that it has."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        command = [*MIGFW, "run", GUEST, f"--name={name}", f"--opt=evidence={folder / 'evidence'}", *arguments]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env={**environment(folder), "TMPDIR": str(temporary)},
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert "QMP at " in line, f"{line!r} {self._log.read_text()}"
        self.uri = line.strip().rpartition(" at ")[2]
        self._client = QmpClient(line.partition("QMP at ")[2].partition(";")[0].strip())
        self.guest = int(self.ask("x-migfw-status")["machine"]["information"]["pid"])

    def ask(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """The result of a QMP command. Raises MigfwError."""
        return self._client.execute(command, arguments)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def status(self) -> str | None:
        """Of its migration; None if the process has ended."""
        try:
            return str(self.ask("query-migrate").get("status", "none")) if self.lives else None
        except MigfwError:
            return None

    def runs(self) -> bool:
        """Whether its guest runs."""
        with contextlib.suppress(MigfwError):
            return self.lives and self.ask("query-status")["status"] == "running"
        return False

    def signal(self, number: int) -> None:
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    def end(self) -> None:
        """Have it quit."""
        with contextlib.suppress(MigfwError):
            if self.lives:
                self.ask("quit")
        self._client.close()
        self._process.wait(PATIENCE)

    def clean_up(self) -> None:
        self._client.close()
        if self.lives:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def log(self) -> str:
        return self._log.read_text()


class Run:
    """One case.

    user_decided   the guest was started on the source by `cont`
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.user_decided = False
        listen = f"unix:{folder / 'to'}" if case.transport == "unix" else "tcp:127.0.0.1:0"
        self._again = f"unix:{folder / 'again'}" if case.transport == "unix" else "tcp:127.0.0.1:0"
        self.source = Process(folder, "source")
        self.destination = Process(folder, "destination", f"--incoming={listen}")
        self.proxy = Proxy(folder, self.destination.uri)
        self._fault = Watch(case.point.forward, case.point.pattern, case.point.skip, self._strike)

    def close(self) -> None:
        self.proxy.__exit__(None, None, None)
        for process in (self.source, self.destination):
            process.clean_up()

    # -- the migration ---------------------------------------------------------------------------------------------

    def migrate(self) -> None:
        """Up to the fault."""
        postcopy = self.case.point.stage is not Stage.PRECOPY
        if self.case.fault in SILENT:
            for process in (self.source, self.destination):
                process.ask("migrate-set-parameters", dict(LIMITS))
        if self.case.point.stage is Stage.RECOVERY:
            self.proxy.stop_at(Watch(False, REQUEST, 0, lambda: self.proxy.cut(Cut.END)))
        else:
            self.proxy.stop_at(self._fault)
        for process in (self.source, self.destination):
            capability = {"capability": "postcopy-ram" if postcopy else "return-path", "state": True}
            process.ask("migrate-set-capabilities", {"capabilities": [capability]})
        self.source.ask("migrate-set-parameters", {"max-postcopy-bandwidth": 1 << 20})
        with contextlib.suppress(MigfwError):  # the fault may have come already
            self.source.ask("migrate", {"uri": self.proxy.uri})
            if postcopy:
                self.source.ask("migrate-start-postcopy")
        if self.case.point.stage is Stage.RECOVERY:
            self._wait(lambda: self.source.status() == self.destination.status() == "postcopy-paused", "the pause")
            self.proxy.stop_at(self._fault)
            self.recover(through_proxy=True)
        if self.case.point.name in ("END", "SHUT 0") and postcopy:
            self._hurry()
        self._wait(self._fault.done.is_set, "the fault")

    def _strike(self) -> None:
        match self.case.fault:
            case Cut() as how:
                self.proxy.cut(how)
            case Blow.KILL_SOURCE:
                self.source.signal(signal.SIGKILL)
            case Blow.KILL_DESTINATION:
                self.destination.signal(signal.SIGKILL)
            case Blow.STOP_SOURCE | Blow.STOP_DESTINATION as blow:
                stopped = self.source if blow is Blow.STOP_SOURCE else self.destination
                stopped.signal(signal.SIGSTOP)
                time.sleep(STOPPED)
                stopped.signal(signal.SIGCONT)

    def _hurry(self) -> None:
        with contextlib.suppress(MigfwError):
            self.source.ask("migrate-set-parameters", {"max-postcopy-bandwidth": 0})

    def recover(self, *, through_proxy: bool = False) -> None:
        """Recover there, resume here."""
        with contextlib.suppress(MigfwError):  # it listens already
            self.destination.ask("migrate-recover", {"uri": self._again})
        uri = self.destination.ask("x-migfw-status")["incoming-uri"]
        if through_proxy:
            self.proxy.lead_to(uri)
            uri = self.proxy.uri
        self.source.ask("migrate", {"uri": uri, "resume": True})

    # -- how it ends -----------------------------------------------------------------------------------------------

    def settle(self) -> str:
        """Do what the documentation asks of the user until nothing more happens. Returns where the guest is."""
        self._hurry()
        self._wait(self._settled, "an end")
        if self.source.lives and not self.source.runs() and not self._may_run_there():
            with contextlib.suppress(MigfwError):
                self.source.ask("cont")
                self.user_decided = True
        running = [process for process in (self.source, self.destination) if process.runs()]
        assert len(running) < 2, "the guest runs twice"
        return running[0].name if running else "nowhere"

    def _settled(self) -> bool:
        source, destination = self.source.status(), self.destination.status()
        if source == "postcopy-paused":
            if destination is None:
                with contextlib.suppress(MigfwError):
                    self.source.ask("migrate_cancel")
                    return False
                return True  # only that engine had the guest's latest state
            if destination not in ("active", "postcopy-active"):
                with contextlib.suppress(MigfwError):
                    self.recover()
            return False
        if source in ENDED:
            return destination is None or destination in (*ENDED, "none", "setup", "postcopy-paused")
        return source is None and destination not in ("active", "postcopy-active", "postcopy-recover")

    def _may_run_there(self) -> bool:
        return self.destination.status() in (
            "active",
            "postcopy-active",
            "postcopy-paused",
            "postcopy-recover",
            "completed",
        )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            states = f"source {self.source.status()}, destination {self.destination.status()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}: {states}"
            time.sleep(0.05)


def run(case: Case) -> None:
    """Run a case. Raises AssertionError with what was wrong, and with the logs of both engines."""
    folder = Path(tempfile.mkdtemp(prefix="migfw-matrix-", dir="/tmp"))
    try:
        with contextlib.closing(Run(case, folder)) as running:
            try:
                _judge(running, folder)
            except AssertionError as error:
                logs = "".join(f"\n--- {one.name}\n{one.log()}" for one in (running.source, running.destination))
                raise AssertionError(f"{case.name}: {error}{logs}") from error
    finally:
        shutil.rmtree(folder)


def _judge(running: Run, folder: Path) -> None:
    case = running.case
    running.migrate()
    where = running.settle()
    killed = case.fault in (Blow.KILL_SOURCE, Blow.KILL_DESTINATION)
    if not killed:
        assert where != "nowhere", "the guest runs nowhere"
    if (
        where != "nowhere" and running.destination.status() != "postcopy-paused"
    ):  # that one waits for the source's pages
        survivor = running.source if where == "source" else running.destination
        survivor.ask("x-migfw-verify")
        before = _steps(folder, survivor.guest)
        running._wait(lambda: _steps(folder, survivor.guest) > before, "a step of the guest")
    if not case.point.handed_over and case.fault is not Blow.KILL_SOURCE:
        assert not running.user_decided, "the source did not resume the guest by itself"
        assert where == "source" or case.fault in (Blow.STOP_SOURCE, Blow.STOP_DESTINATION), where
    _check_evidence(running, folder, killed)
    for process in (running.source, running.destination):
        process.end()
    for process in (running.source, running.destination):
        running._wait(partial(_has_ended, process.guest), "the end of a guest")
    left = sorted(str(path.relative_to(folder)) for path in _left(folder))
    dead: dict[Fault, list[str]] = {
        Blow.KILL_SOURCE: ["migfw/source.qmp"],
        Blow.KILL_DESTINATION: ["migfw/destination.qmp", "to", "again"],
    }
    assert set(left) <= set(dead.get(case.fault, ())), f"left behind: {left}"


def _has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def _left(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.name not in ("evidence", "source.log", "destination.log", "proxy") and not path.is_dir():
            yield path


def _lines(folder: Path) -> list[tuple[int, int]]:
    return [
        (int(pid), int(step)) for pid, step in (line.split() for line in (folder / "evidence").read_text().splitlines())
    ]


def _steps(folder: Path, guest: int) -> int:
    return sum(pid == guest for pid, _ in _lines(folder))


def _check_evidence(running: Run, folder: Path, killed: bool) -> None:
    """Every step was made once, and the guest changed sides at most once; after a kill it may have gone back."""
    lines = _lines(folder)
    sides = [pid for index, (pid, _) in enumerate(lines) if index == 0 or lines[index - 1][0] != pid]
    assert len(sides) <= (3 if killed else 2), f"the guest ran on {sides} in turn"
    if not killed:
        steps = [step for _, step in lines]
        assert steps == list(range(1, len(steps) + 1)), "a step was lost or made twice"
