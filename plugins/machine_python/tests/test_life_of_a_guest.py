"""The guest's process and its engine: each notices the end of the other, nothing hangs, and nothing is left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corefw_machine_python import PythonMachine

from corefw.errors import MachineError, UsageError
from corefw.machine import MachineConfig, RunState
from corefw.testing.tasks import wait_until

PLAIN = Path(__file__).parent / "programs" / "plain.py"

Make = Callable[..., PythonMachine]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make machines, as in make("Fails", option="value"); they are closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(program: str, incoming: bool = False, **options: str) -> PythonMachine:
            machine = PythonMachine(MachineConfig(f"{PLAIN}:{program}", options, incoming))
            stack.callback(machine.close)
            return machine

        yield make


def wait_for(machine: PythonMachine, state: RunState) -> None:
    assert wait_until(lambda: machine.run_state is state), f"still {machine.run_state}, not {state}"


def field(machine: PythonMachine, name: str) -> object:
    return getattr(machine.devices()[0].state, name)


# -- programs that end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "reason", "logged"),
    [
        ("Fails", "ZeroDivisionError: ten is enough (plain.py, line ", "in tick"),
        ("Dies", "its process was killed by SIGABRT", "SIGABRT"),
        ("Exits", "SystemExit: 3 (plain.py, line ", "SystemExit"),
    ],
)
def test_a_program_that_goes_wrong(
    make: Make, caplog: pytest.LogCaptureFixture, program: str, reason: str, logged: str
) -> None:
    caplog.set_level(logging.INFO)
    machine = make(program, **({"code": "3"} if program == "Exits" else {}))
    changes: list[tuple[RunState, RunState]] = []
    machine.watch(lambda old, new: changes.append((old, new)))
    machine.start()
    wait_for(machine, RunState.INTERNAL_ERROR)
    assert str(machine.information()["error"]).startswith(reason)
    assert wait_until(lambda: changes[-1:] == [(RunState.RUNNING, RunState.INTERNAL_ERROR)])
    assert logged in caplog.text
    for order in (machine.start, lambda: machine.stop(RunState.PAUSED), machine.verify):
        with pytest.raises(MachineError, match="the guest has ended: ") as caught:
            order()
        assert "\n" not in str(caught.value)
    machine.set_run_state(RunState.POSTMIGRATE)
    assert machine.run_state is RunState.INTERNAL_ERROR


def test_a_guest_runs_when_its_setup_is_through(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    machine = make("FailsInSetup")
    with pytest.raises(MachineError, match="RuntimeError: no setup today"):
        machine.start()
    wait_for(machine, RunState.INTERNAL_ERROR)
    assert "in setup" in caplog.text


def test_the_traceback_begins_in_the_users_code(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    machine = make("Fails")
    machine.start()
    wait_for(machine, RunState.INTERNAL_ERROR)
    assert 'raise ZeroDivisionError("ten is enough")' in caplog.text
    assert "guestmain.py" not in caplog.text


def test_a_field_that_refuses_a_value_names_the_users_line(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    machine = make("Overflows")
    machine.start()
    wait_for(machine, RunState.INTERNAL_ERROR)
    lines = PLAIN.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "one too many" in text)
    assert machine.information()["error"] == (
        f"ValueError: field 'small' is u8: 256 is not in 0 to 255 (plain.py, line {line}, in tick)"
    )
    assert "declarations.py" not in caplog.text


@pytest.mark.parametrize("program", ["Finishes", "Exits"])
def test_a_program_that_is_done(make: Make, program: str) -> None:
    machine = make(program)
    machine.start()
    wait_for(machine, RunState.SHUTDOWN)
    assert "error" not in machine.information()
    assert field(machine, "steps") == (5 if program == "Finishes" else 0)


def test_a_guest_that_somebody_kills(make: Make) -> None:
    machine = make("Silent")
    machine.start()
    os.kill(machine.pid, signal.SIGKILL)
    wait_for(machine, RunState.INTERNAL_ERROR)
    assert machine.information()["error"] == "its process was killed by SIGKILL"


def test_a_guest_that_dies_during_a_harvest_of_its_dirty_log(make: Make) -> None:
    machine = make("Plain")
    log = machine.ram_blocks()[0].dirty_log
    machine.start()
    log.start()
    os.kill(machine.pid, signal.SIGKILL)
    wait_for(machine, RunState.INTERNAL_ERROR)
    with contextlib.suppress(MachineError):
        log.harvest()
    log.stop()
    log.stop()


def test_ctrl_c_does_not_reach_the_guest(make: Make) -> None:
    machine = make("Silent")
    machine.start()
    assert os.getsid(machine.pid) != os.getsid(0)
    os.kill(machine.pid, signal.SIGINT)
    machine.stop(RunState.PAUSED)
    assert machine.run_state is RunState.PAUSED


ENGINE = """
import sys, time
from corefw.machine import MachineConfig
from corefw_machine_python import PythonMachine
import threading
made = []
# Made by a thread that ends: a guest must not die with the thread that made it.
thread = threading.Thread(target=lambda: made.append(PythonMachine(MachineConfig(sys.argv[1], {"seconds": "3600"}))))
thread.start()
thread.join()
made[0].start()
time.sleep(0.2)
assert str(made[0].run_state) == "running"
print(made[0].pid, flush=True)
time.sleep(3600)
"""


def test_the_guest_dies_with_its_engine() -> None:
    """Even in the middle of a tick that takes an hour."""
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, f"{PLAIN}:Slow"], stdout=subprocess.PIPE, text=True)
    try:
        assert engine.stdout is not None
        guest = os.pidfd_open(int(engine.stdout.readline()))
        try:
            assert not select.select([guest], [], [], 0)[0]
            engine.kill()
            assert select.select([guest], [], [], 60)[0], "the guest lives on without its engine"
        finally:
            os.close(guest)
    finally:
        engine.kill()
        engine.communicate()


# -- starts and stops --------------------------------------------------------------------------------------------------


def test_a_tick_that_takes_too_long(make: Make) -> None:
    machine = make("Slow", seconds="0.9")
    errors: list[str] = []

    def too_slow() -> bool:
        machine.start()
        try:
            machine.stop(RunState.PAUSED)  # between two ticks, now and then
        except MachineError as error:
            errors.append(str(error))
        return bool(errors)

    assert wait_until(too_slow)
    assert errors[0].startswith(
        "the guest did not stop within 0.3 s, because its tick() takes longer; it keeps running ("
    )
    assert machine.run_state is RunState.RUNNING
    # It continues after that tick, and a stop near the end of a tick succeeds.

    def stopped() -> bool:
        with contextlib.suppress(MachineError):
            machine.stop(RunState.PAUSED)
        return machine.run_state is RunState.PAUSED

    assert wait_until(stopped)
    assert int(str(field(machine, "steps"))) >= 1


def test_the_first_question_comes_during_a_long_tick(make: Make) -> None:
    """The answer has the fields from when the guest started."""
    machine = make("Slow", seconds="30")
    machine.start()
    assert machine.information()["fields"] == {"steps": 0}


def test_a_program_that_refuses_to_stop_runs_on(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    machine = make("Refuses")
    machine.start()
    assert wait_until(lambda: bool(machine.verify()["steps"]))
    with pytest.raises(MachineError, match=r"RuntimeError: in the middle of something \(plain\.py, line "):
        machine.stop(RunState.PAUSED)
    assert machine.run_state is RunState.RUNNING
    machine.stop(RunState.PAUSED)
    assert field(machine, "asked") == 2
    assert "in before_stop" in caplog.text


def test_a_program_that_cannot_start_where_it_arrived(make: Make) -> None:
    machine = make("FailsInAfterStart", incoming=True)
    state = machine.devices()[0].state
    setattr(state, "set-up", True)
    setattr(state, "steps", 7)  # noqa: B010 - it has no such attribute that mypy knows
    with pytest.raises(MachineError, match="RuntimeError: the printer is on fire"):
        machine.start()
    assert machine.run_state is RunState.INMIGRATE


def test_setup_is_done_once_and_after_start_each_time(make: Make) -> None:
    machine = make("Plain")
    for starts in (1, 2, 3):
        machine.start()
        assert wait_until(lambda expected=starts: machine.verify()["starts"] == expected)  # type: ignore[misc]
        machine.stop(RunState.PAUSED)
    assert field(machine, "starts") == 3


def test_a_guest_that_was_never_started_is_set_up_where_it_arrives(make: Make) -> None:
    machine = make("Plain")
    machine.stop(RunState.FINISH_MIGRATE)
    assert field(machine, "set-up") is False
    assert machine.ram_blocks()[0].holes().tolist() == [[0, 1]]


def test_arrays_are_rounded_up_to_pages(make: Make) -> None:
    machine = make("Plain", rows="5")
    assert {block.idstr: block.length for block in machine.ram_blocks()} == {"small": 4096, "large": 102_400}


def test_what_status_shows(make: Make) -> None:
    machine = make("Plain")
    shown = machine.information()
    assert shown["program"] == f"{PLAIN}:Plain"
    assert shown["pid"] == machine.pid
    assert shown["ram"] == {"small": 4096, "large": 102_400}
    fields = shown["fields"]
    assert isinstance(fields, dict)
    assert (fields["u8"], fields["text"], fields["raw"], fields["flag"]) == (200, "Grüße", "6162000000", True)
    machine.start()

    def steps() -> int:
        fields = machine.information()["fields"]
        assert isinstance(fields, dict)
        return int(fields["steps"])

    assert wait_until(lambda: steps() > 0)
    first = steps()
    assert wait_until(lambda: steps() > first), "it runs on while it is asked"


def test_a_program_that_cannot_verify_itself(make: Make) -> None:
    machine = make("Silent")
    with pytest.raises(UsageError, match=r"program 'Silent' cannot verify itself: it has no verify\(\)"):
        machine.verify()


@pytest.mark.parametrize(
    ("verdict", "problem"),
    [("number", "this is of type int"), ("no", "this is of type bool"), ("numpy", "int64"), ("nan", "float")],
)
def test_a_program_that_verifies_itself_with_something_other_than_json(make: Make, verdict: str, problem: str) -> None:
    machine = make("Verdict", verdict=verdict)
    machine.start()
    with pytest.raises(MachineError, match=rf"verify\(\) of program 'Verdict' has to return a dict .*: .*{problem}"):
        machine.verify()
    assert machine.run_state is RunState.RUNNING
    machine.stop(RunState.PAUSED)


def test_a_program_that_verifies_itself_with_nothing(make: Make) -> None:
    machine = make("Verdict")
    machine.start()
    assert machine.verify() == {}


def test_orders_from_several_threads_at_once(make: Make) -> None:
    machine = make("Plain")
    machine.start()
    errors: list[BaseException] = []

    def verify() -> None:
        try:
            for _ in range(10):
                machine.verify()
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=verify) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
