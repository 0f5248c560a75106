"""A program that starts other processes: what works, and the errors for what does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from corefw_machine_python import PythonMachine

from corefw.machine import MachineConfig, RunState
from corefw.testing.tasks import wait_until

Make = Callable[[str], PythonMachine]

HEAD = """
import multiprocessing, os, subprocess, sys, time
import numpy as np
from corefw_machine_python import guest

def of_the_program(n):
    return int(P.running.grid[n])

def of_a_view(n):
    P.view[:] = 99
    return int(P.view[n])

def of_a_copy(row):
    return int(row.sum())

class P(guest.Program):
    grid = guest.array("grid", 5000, "i8")
    step = guest.field("u64")
    out = guest.field("i64", -1)

    def setup(self):
        self.grid[:] = 7

    def after_start(self):
        P.running, P.view = self, self.grid[:]
"""
TICK = """
    def tick(self):
        self.step += 1
        if self.step == 1:
            self.once()
        time.sleep(0.001)

    def verify(self):
        return {"step": self.step, "out": self.out, "grid": int(self.grid[0])}
"""

WARNING = "migfw: program 'P' forks: its arrays are not in the new process"
ADVICE = (
    "array 'grid' does not exist in a forked process: use threads, or multiprocessing.get_context('spawn') and give"
)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make a machine whose program calls this function once."""
    with contextlib.ExitStack() as stack:

        def make(once: str) -> PythonMachine:
            path = tmp_path / "forks.py"
            lines = "".join(f"        {line}\n" for line in once.splitlines())
            path.write_text(f"{HEAD}\n    def once(self):\n{lines}{TICK}")
            machine = PythonMachine(MachineConfig(f"{path}:P"))
            stack.callback(machine.close)
            return machine

        yield make


def outcome(machine: PythonMachine) -> int:
    machine.start()
    assert wait_until(lambda: machine.run_state is not RunState.RUNNING or int(str(machine.verify()["step"])) > 1)
    assert machine.run_state is RunState.RUNNING, machine.information()
    facts = machine.verify()
    assert facts["grid"] == 7
    assert (np.frombuffer(machine.ram_blocks()[0].view, "i8")[:5000] == 7).all(), "the RAM is as it was"
    return int(str(facts["out"]))


def test_a_pool_by_fork_fails_with_advice_and_does_not_hang(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    machine = make("with multiprocessing.get_context('fork').Pool(2) as pool: pool.map(of_the_program, range(4))")
    machine.start()
    assert wait_until(lambda: machine.run_state is RunState.INTERNAL_ERROR)
    assert str(machine.information()["error"]).startswith(f"RuntimeError: {ADVICE}")
    assert capfd.readouterr().err.count(WARNING) == 1, "said once"


def test_views_in_a_child_are_private_copies(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    machine = make(
        "with multiprocessing.get_context('fork').Pool(2) as pool: self.out = sum(pool.map(of_a_view, range(4)))"
    )
    assert outcome(machine) == 4 * 99
    assert WARNING in capfd.readouterr().err


def test_spawn_works(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    machine = make(
        "with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
        "    self.out = sum(pool.map(of_a_copy, [self.grid[:10], self.grid[10:20]]))"
    )
    assert outcome(machine) == 140
    assert WARNING not in capfd.readouterr().err


@pytest.mark.parametrize(
    "once",
    [
        "self.out = int(subprocess.run([sys.executable, '-c', 'print(5)'], capture_output=True).stdout)",
        "self.out = 5 + os.system('exit 0')",
        "self.out = int(os.popen('echo 5').read())",
    ],
)
def test_other_programs_are_nobodys_business(make: Make, once: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert outcome(make(once)) == 5
    assert WARNING not in capfd.readouterr().err


@pytest.mark.parametrize("ending", ["return", "sys.exit(3)", "raise RuntimeError('in the child')", "os._exit(3)"])
def test_a_child_that_comes_back_is_not_a_second_guest(make: Make, ending: str) -> None:
    machine = make(
        f"pid = os.fork()\nif not pid:\n    {ending}\nself.out = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
    )
    expected = {"return": 0, "sys.exit(3)": 3, "os._exit(3)": 3}.get(ending, 1)
    assert outcome(machine) == expected
    machine.stop(RunState.PAUSED)
    machine.start()
    assert outcome(machine) == expected
