"""A guest that runs while its arrays are still arriving waits for each page, and computes with what arrives."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corefw_machine_python import PythonMachine
from corefw_machine_python.table import SET_UP

from corefw.errors import MachineError
from corefw.machine import FaultSource, MachineConfig, RunState
from corefw.memory import userfault
from corefw.memory.runs import runs_of_pages

PLAIN = Path(__file__).parent / "programs" / "plain.py"
PATIENCE = 60.0
STEPS = 41


@pytest.fixture
def machine() -> Iterator[PythonMachine]:
    """A destination whose device state has arrived."""
    machine = PythonMachine(MachineConfig(f"{PLAIN}:Plain", {}, incoming=True))
    state = machine.devices()[0].state
    setattr(state, SET_UP, True)
    state.steps, state.real = STEPS, STEPS / 3  # type: ignore[attr-defined]
    yield machine
    machine.close()


def next_faults(source: FaultSource) -> dict[str, list[int]]:
    ready, _, _ = select.select([source], [], [], PATIENCE)
    assert ready, "the guest does not wait for a page"
    return {name: waiting[:, 0].tolist() for name, waiting in source.poll().items()}


def test_a_guest_goes_on_page_by_page(machine: PythonMachine) -> None:
    small, large = machine.ram_blocks()
    assert machine.postcopy_unsupported() is None
    source = machine.watch_faults()
    starting = threading.Thread(target=machine.start)
    starting.start()
    assert next_faults(source) == {"small": [0]}
    small.view[: 3 * 7 * 4] = np.full(3 * 7, STEPS + 1, dtype=np.int32).tobytes()
    source.install(small, runs_of_pages(np.array([0])))
    assert next_faults(source) == {"large": [0]}
    starting.join(PATIENCE)
    assert machine.run_state is RunState.RUNNING
    source.install(large, runs_of_pages(np.array([0])))
    source.release()
    assert int(str(machine.verify()["steps"])) > STEPS
    machine.stop(RunState.PAUSED)
    assert np.frombuffer(small.view, dtype=np.int32)[0] == machine.devices()[0].state.steps + 1  # type: ignore[attr-defined]


def test_what_the_guest_had_mapped_before_is_awaited_again(machine: PythonMachine) -> None:
    """A check has mapped pages in the guest's process; then the pages arrive again."""
    small, _ = machine.ram_blocks()
    small.view[: 3 * 7 * 4] = np.full(3 * 7, STEPS + 1, dtype=np.int32).tobytes()
    machine.verify()
    source = machine.watch_faults()
    starting = threading.Thread(target=machine.start)
    starting.start()
    assert next_faults(source) == {"small": [0]}
    source.install(small, runs_of_pages(np.array([0])))
    source.release()
    starting.join(PATIENCE)


def test_a_guest_that_waits_for_a_page_before_it_runs_is_given_time() -> None:
    machine = PythonMachine(MachineConfig(f"{PLAIN}:LooksAround", {}, incoming=True))
    setattr(machine.devices()[0].state, SET_UP, True)
    source = machine.watch_faults()
    starting = threading.Thread(target=machine.start)
    starting.start()
    try:
        assert next_faults(source) == {"small": [0]}
        starting.join(0.5)  # longer than its stop_timeout
        source.release()
        starting.join(PATIENCE)
        assert machine.run_state is RunState.RUNNING
    finally:
        machine.close()


def test_a_guest_that_does_not_start_once_its_pages_are_there() -> None:
    machine = PythonMachine(MachineConfig(f"{PLAIN}:Dawdles", {}, incoming=True))
    state = machine.devices()[0].state
    setattr(state, SET_UP, True)
    state.steps = STEPS  # type: ignore[attr-defined]
    machine.watch_faults().release()
    try:
        with pytest.raises(MachineError, match="did not start within"):
            machine.start()
        assert machine.run_state is RunState.INMIGRATE
    finally:
        machine.close()


def test_a_host_that_cannot_is_named(machine: PythonMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(userfault, "register", deny)
    assert machine.postcopy_unsupported() is not None
    with pytest.raises(MachineError, match="page faults"):
        machine.watch_faults()
