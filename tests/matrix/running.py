"""Run a case of the matrix with real `migfw run` processes, and check how it ended.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from corefw.errors import MigfwError
from corefw.qmp.client import QmpClient
from tests.helpers.cli import MIGFW, environment
from tests.helpers.cutting import Cut, CutProxy, Watch
from tests.helpers.sshd import Sshd
from tests.matrix import witness
from tests.matrix.cases import SILENT, Blow, Case, Fault
from tests.matrix.points import PAUSED, Stage
from tests.matrix.routes import ROUTES

PATIENCE: Final = 60.0
"""Maximum seconds for one step, far more than it takes."""

LIMITS: Final = {"x-migfw-confirm-timeout": 4000, "x-migfw-incoming-timeout": 4000, "x-migfw-liveness": 4}
"""Parameters for faults that cause silence. The first two are milliseconds, the last is seconds."""

STOPPED: Final = 5.0
"""Seconds that a process is stopped: more than the limits."""

AWAITS_NOTHING: Final = ("PART", "status active")
"""Points of precopy at which no answer is due until the handover."""

ENDED: Final = ("completed", "failed", "cancelled")
GUEST: Final = f"{witness.__file__}:Witness"


class Process:
    """A `migfw run`, and the guest that it has."""

    def __init__(self, folder: Path, name: str, *arguments: str, environ: Mapping[str, str]) -> None:
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
                env={**environment(folder), "TMPDIR": str(temporary), **environ},
            )
        with contextlib.ExitStack() as unless_it_starts:
            unless_it_starts.callback(self._kill)
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            assert "QMP at " in line, f"{line!r} {self._log.read_text()}"
            self.uri = line.strip().rpartition(" at ")[2]
            self._client = QmpClient(line.partition("QMP at ")[2].partition(";")[0].strip())
            unless_it_starts.callback(self._client.close)
            self.guest = int(self.ask("x-migfw-status")["machine"]["information"]["pid"])
            unless_it_starts.pop_all()

    def ask(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """The result of a QMP command. Raises MigfwError."""
        return self._client.execute(command, arguments)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def status(self) -> str | None:
        """The status of its migration; None if the process has ended."""
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
        """Quit the engine."""
        with contextlib.suppress(MigfwError):
            if self.lives:
                self.ask("quit")
        self._client.close()
        self._process.wait(PATIENCE)

    def clean_up(self) -> None:
        self._client.close()
        self._kill()

    def _kill(self) -> None:
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

    def __init__(self, case: Case, folder: Path, sshd: Sshd | None) -> None:
        self.case = case
        self.user_decided = False
        self._route = ROUTES[case.way.transport](folder, sshd)
        with contextlib.ExitStack() as started:
            self.destination = Process(folder, "destination", f"--incoming={self._route.listen}", environ={})
            started.callback(self.destination.clean_up)
            self.proxy = started.enter_context(CutProxy(self._route.target(self.destination.uri)))
            self._dialed = self._route.through(self.proxy, self.destination.uri)
            self.source = Process(folder, "source", environ=self._route.environment)
            started.callback(self.source.clean_up)
            self._started = started.pop_all()
        self._fault = Watch(case.point.forward, case.point.pattern, case.point.skip, self._strike)

    def close(self) -> None:
        self._started.close()

    # -- the migration ---------------------------------------------------------------------------------------------

    def migrate(self) -> None:
        """Run the migration up to the fault."""
        point = self.case.point
        self._prepare()
        if point.stage is not Stage.RECOVERY and not point.status:
            self.proxy.stop_at(self._fault)
        with contextlib.suppress(MigfwError):  # the fault may have come already
            self.source.ask("migrate", {"uri": self._dialed})
            if point.stage is not Stage.PRECOPY:
                self.source.ask("migrate-start-postcopy")
        if point.stage is Stage.RECOVERY:
            self._pause()
            if not point.status:
                self.proxy.stop_at(self._fault)
            if point is not PAUSED:
                self.recover(through_proxy=True)
        if point.status:
            self.wait(lambda: self.source.status() == point.status, point.status)
            self._strike()
        else:
            if point.name in ("END", "SHUT 0"):
                self._hurry()
            self.wait(self._fault.done.is_set, "the fault")

    def _prepare(self) -> None:
        """Set the parameters that the case needs to reach its point and to notice its fault."""
        point = self.case.point
        capabilities = ["return-path" if point.stage is Stage.PRECOPY else "postcopy-ram"]
        if point.status == "pre-switchover":
            capabilities.append("pause-before-switchover")
        if self.case.way.preempt:
            capabilities.append("postcopy-preempt")
        for process in (self.source, self.destination):
            switched = [{"capability": name, "state": True} for name in capabilities]
            process.ask("migrate-set-capabilities", {"capabilities": switched})
            if self.case.fault in SILENT:
                process.ask("migrate-set-parameters", dict(LIMITS))
        if point.stage is not Stage.PRECOPY or point.status == "active":
            limits = dict.fromkeys(("max-bandwidth", "max-postcopy-bandwidth"), 1 << 20)
            self.source.ask("migrate-set-parameters", {**limits})

    def _pause(self) -> None:
        """Break the first connection once the guest runs on the destination."""
        self.wait(lambda: self.destination.status() == "postcopy-active" and self.destination.runs(), "postcopy")
        self.proxy.cut_all(Cut.END)
        self.wait(lambda: self.source.status() == self.destination.status() == "postcopy-paused", "the pause")

    def _strike(self) -> None:
        match self.case.fault:
            case Cut() as how:
                (self.proxy.cut if self.case.point.alone else self.proxy.cut_all)(how)
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
            self.source.ask("migrate-set-parameters", {"max-bandwidth": 0, "max-postcopy-bandwidth": 0})

    def recover(self, *, through_proxy: bool = False) -> None:
        """Recover there, resume here."""
        with contextlib.suppress(MigfwError):  # it listens already
            self.destination.ask("migrate-recover", {"uri": self._route.listen_again})
        uri = self.destination.ask("x-migfw-status")["incoming-uri"]
        if through_proxy:
            self.proxy.lead_to(self._route.target(uri))
            uri = self._route.through(self.proxy, uri)
        self.source.ask("migrate", {"uri": uri, "resume": True})

    # -- how it ends -----------------------------------------------------------------------------------------------

    def settle(self) -> str:
        """Do what the documentation asks of the user until nothing more happens. Returns where the guest is."""
        self._hurry()
        self.wait(self._settled, "an end")
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
            if destination != "active":
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

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            states = f"source {self.source.status()}, destination {self.destination.status()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}: {states}"
            time.sleep(0.05)


def run(case: Case, sshd: Sshd | None = None) -> str:
    """Run a case, and return where the guest ends. `ssh` needs an sshd. Raises AssertionError that says what was wrong,
    with the logs of both engines."""
    folder = Path(tempfile.mkdtemp(prefix="migfw-matrix-", dir="/tmp"))
    try:
        with contextlib.closing(Run(case, folder, sshd)) as running:
            try:
                return _judge(running, folder)
            except AssertionError as error:
                logs = "".join(f"\n--- {one.name}\n{one.log()}" for one in (running.source, running.destination))
                raise AssertionError(f"{case.name}: {error}{logs}") from error
    finally:
        shutil.rmtree(folder)


def _judge(running: Run, folder: Path) -> str:
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
        running.wait(lambda: _steps(folder, survivor.guest) > before, "a step of the guest")
    if not case.point.handed_over and case.fault is not Blow.KILL_SOURCE:
        assert not running.user_decided, "the source did not resume the guest by itself"
        assert where == "source" or _may_go_on(case), where
    _check_evidence(running, folder, killed)
    for process in (running.source, running.destination):
        process.end()
    running.wait(lambda: not _processes(folder), "the end of every process")
    left = sorted(str(path.relative_to(folder)) for path in _left(folder))
    dead: dict[Fault, list[str]] = {
        Blow.KILL_SOURCE: ["migfw/source.qmp"],
        Blow.KILL_DESTINATION: ["migfw/destination.qmp", "to", "again"],
    }
    assert set(left) <= set(dead.get(case.fault, ())), f"left behind: {left}"
    return f"{where}, by the user's cont" if running.user_decided else where


def _may_go_on(case: Case) -> bool:
    """Whether the source can still reach the handover: the process continued, or no answer was due."""
    if case.fault is Cut.LOSE_BACKWARD:
        return case.point.name in AWAITS_NOTHING
    return case.fault in (Blow.STOP_SOURCE, Blow.STOP_DESTINATION)


def _processes(folder: Path) -> list[str]:
    """The engines of this case, and the processes that they started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink() == folder:
                found.append(entry.name)
    return found


def _left(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        ours = path.name in ("evidence", "source.log", "destination.log", "proxy") or folder / "home" in path.parents
        if not ours and not path.is_dir():
            yield path


def _lines(folder: Path) -> list[tuple[int, int]]:
    return [
        (int(pid), int(step)) for pid, step in (line.split() for line in (folder / "evidence").read_text().splitlines())
    ]


def _steps(folder: Path, guest: int) -> int:
    return sum(pid == guest for pid, _ in _lines(folder))


def _check_evidence(running: Run, folder: Path, killed: bool) -> None:
    """Check that every step was made once, and that the guest moved at most once; after a kill it may go back."""
    lines = _lines(folder)
    sides = [pid for index, (pid, _) in enumerate(lines) if index == 0 or lines[index - 1][0] != pid]
    assert len(sides) <= (3 if killed else 2), f"the guest ran on {sides} in turn"
    if not killed:
        steps = [step for _, step in lines]
        assert steps == list(range(1, len(steps) + 1)), "a step was lost or made twice"
