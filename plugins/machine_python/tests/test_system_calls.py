"""System calls on arrays whose pages have not arrived in postcopy: they wait where that is permitted, and elsewhere a
program touches the array first."""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path

import numpy as np
import pytest
from corefw_machine_python import PythonMachine, guest
from corefw_machine_python.table import SET_UP

from corefw.machine import DEAD, FaultSource, MachineConfig
from corefw.memory import userfault
from corefw.memory.faults import FEATURES
from corefw.memory.runs import runs_of_pages
from corefw.testing.tasks import wait_until
from tests.helpers.users import run_as_an_ordinary_user

PROGRAM = Path(__file__).parent / "programs" / "syscalls.py"
SCENARIO = """
import sys
sys.path.insert(0, sys.argv[1])
from test_system_calls import may_serve_system_calls, run
print(may_serve_system_calls(), run(touch=True), run(touch=False))
"""


def serve(machine: PythonMachine, faults: FaultSource, done: threading.Event) -> None:
    blocks = {block.idstr: block for block in machine.ram_blocks()}
    while not done.is_set():
        select.select([faults], [], [], 0.05)
        for idstr, waiting in faults.poll().items():
            faults.install(blocks[idstr], runs_of_pages(np.unique(waiting[:, 0])))


def rounds(machine: PythonMachine) -> int:
    fields = machine.information()["fields"]
    assert isinstance(fields, dict)
    return int(fields["rounds"])


def run(*, touch: bool) -> str:
    """Let the program run while its pages arrive one by one; return "ok", or why the guest ended."""
    machine = PythonMachine(MachineConfig(f"{PROGRAM}:SystemCalls", {"touch": str(touch)}, incoming=True))
    setattr(machine.devices()[0].state, SET_UP, True)
    faults, done = machine.watch_faults(), threading.Event()
    serving = threading.Thread(target=serve, args=(machine, faults, done))
    serving.start()
    try:
        machine.start()
        assert wait_until(lambda: machine.run_state in DEAD or rounds(machine) > 1)
        if machine.run_state in DEAD:
            return str(machine.information()["error"])
        machine.verify()
        return "ok"
    finally:
        done.set()
        serving.join()
        machine.close()


def may_serve_system_calls() -> bool:
    try:
        os.close(userfault.create_unrestricted(FEATURES))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not may_serve_system_calls(), reason="userfaultfd may not serve system calls here")
def test_system_calls_wait_where_that_is_permitted() -> None:
    assert run(touch=False) == "ok"


def test_an_ordinary_users_program_touches_its_arrays_first() -> None:
    shown = run_as_an_ordinary_user(SCENARIO, str(Path(__file__).parent))
    permitted, touched, untouched = shown.split(" ", 2)
    assert touched == "ok"
    assert untouched == "ok" if permitted == "True" else "guest.touch()" in untouched


def test_touch_takes_what_a_system_call_takes() -> None:
    grid = np.zeros((8, 4096), dtype="f8")
    records = np.zeros(1000, dtype=[("a", "u1"), ("b", "f4")])
    for buffer in (grid, grid[2:3], grid[:0], records, np.array(1.0)):
        assert guest.touch(buffer) is buffer
    with pytest.raises(ValueError, match="contiguous"):
        guest.touch(grid[:, ::2])
