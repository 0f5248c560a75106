"""The bundled programs: stress notices one lost write, and life can be watched."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from corefw_machine_python import PythonMachine

from corefw.errors import MachineError
from corefw.machine import MachineConfig, RunState
from corefw.testing.tasks import private_memory, wait_until

MIB = 1 << 20
OPTIONS = {"ram": "4M", "working-set": "1M", "dirty-rate": "50M"}

Make = Callable[..., PythonMachine]


@pytest.fixture
def make() -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make(program: str, **options: str) -> PythonMachine:
            given = {name.replace("_", "-"): value for name, value in options.items()}
            machine = PythonMachine(MachineConfig(program, given))
            stack.callback(machine.close)
            return machine

        yield make


@pytest.fixture
def stress(make: Make) -> PythonMachine:
    """A stress guest that has written, and is stopped."""
    machine = make("stress", ram="4M", working_set="1M", dirty_rate="50M")
    machine.start()
    assert wait_until(lambda: bool(machine.verify()["writes"]))
    machine.stop(RunState.PAUSED)
    return machine


def test_stress_counts_its_writes(stress: PythonMachine) -> None:
    pages = stress.ram_blocks()[0].pages.view(np.uint64)
    state = vars(stress.devices()[0].state)
    assert int(pages[:256, 0].sum()) == state["writes"] > 0
    assert stress.verify() == {"writes": state["writes"], "found": state["writes"], "pages": 1024}


@pytest.mark.parametrize(("ram", "written_to"), [("1M", 256), ("80M", 16384)])
def test_stress_writes_to_64_mib_or_to_all_that_it_has(make: Make, ram: str, written_to: int) -> None:
    machine = make("stress", ram=ram)
    machine.start()
    assert wait_until(lambda: bool(machine.verify()["writes"]))
    machine.stop(RunState.PAUSED)
    assert vars(machine.devices()[0].state)["working_pages"] == written_to


def test_stress_does_not_compress(stress: PythonMachine) -> None:
    import zlib

    data = bytes(stress.ram_blocks()[0].view[MIB : 2 * MIB])
    assert len(zlib.compress(data, 1)) > 0.99 * len(data)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (0, "writes were counted, but the pages in RAM have seen"),
        (5, "page 0 of the RAM is not what the seed 1 put there"),
        (1023 * 512 + 511, "page 1023 of the RAM is not what the seed 1 put there"),
        (256 * 512, "a page from 256 on, outside the working set, was written to"),
    ],
)
def test_stress_notices_one_lost_write(stress: PythonMachine, word: int, message: str) -> None:
    stress.ram_blocks()[0].view.cast("Q")[word] ^= 1
    with pytest.raises(MachineError, match=message):
        stress.verify()


def test_stress_holds_its_rate_however_long_it_runs(make: Make) -> None:
    """Only an upper bound is checked, because a busy host may be slower."""
    machine = make("stress", ram="4M", working_set="1M", dirty_rate="40K")
    began = time.monotonic()
    machine.start()
    assert wait_until(lambda: int(str(machine.verify()["writes"])) >= 5)
    machine.stop(RunState.PAUSED)
    seconds = time.monotonic() - began
    assert vars(machine.devices()[0].state)["writes"] <= 10 * seconds + 1


def test_the_engine_has_no_copy_of_the_guests_memory(make: Make) -> None:
    before = private_memory()
    machine = make("stress", ram="64M")
    machine.start()
    machine.verify()
    assert machine.ram_blocks()[0].holes().tolist() == []
    assert private_memory() - before < 16 * MIB


WATCH = """
import sys, time
from corefw.machine import MachineConfig, RunState
from corefw_machine_python import PythonMachine
machine = PythonMachine(MachineConfig("life", {"size": "40x20", "fps": "200"}))
machine.start()
while not machine.verify().get("generation", 0) > 10:
    time.sleep(0.01)
machine.stop(RunState.PAUSED)
machine.close()
"""


def test_life_draws_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60", "LINES": "24", "PYTHONIOENCODING": "utf-8"}
    program = subprocess.Popen([sys.executable, "-c", WATCH], stdout=theirs, env=environment)
    os.close(theirs)
    shown = bytearray()
    try:
        with contextlib.suppress(OSError):  # EIO: no process has the terminal open any more
            while piece := os.read(ours, 1 << 16):
                shown += piece
        assert program.wait(30) == 0
    finally:
        program.kill()
        program.wait()
        os.close(ours)
    text = shown.decode()
    assert text.count("\x1b[H") > 10
    assert "generation 11: " in text
    assert "█" in text
    assert "stopped on " in text


def test_life_prints_lines_elsewhere() -> None:
    done = subprocess.run([sys.executable, "-c", WATCH], capture_output=True, text=True, timeout=120, check=True)
    assert "generation 0: " in done.stdout
    assert "\x1b" not in done.stdout


def test_life_goes_the_same_way_wherever_it_is(make: Make) -> None:
    """It depends on the state alone: two worlds with one seed, stopped at the same generation, are equal."""

    def stopped_now_and_then() -> dict[int, bytes]:
        machine = make("life", size="16x16", fps="1000", seed="3")
        seen: dict[int, bytes] = {}
        machine.start()
        while max(seen, default=0) < 400:
            machine.stop(RunState.PAUSED)
            seen[vars(machine.devices()[0].state)["generation"]] = bytes(machine.ram_blocks()[0].view[:256])
            machine.start()
        machine.close()
        return seen

    one = stopped_now_and_then()
    while not (both := one.keys() & (other := stopped_now_and_then()).keys()):
        pass  # on a busy machine a world is not stopped often
    assert all(one[generation] == other[generation] for generation in both)
