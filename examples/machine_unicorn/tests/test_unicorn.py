"""The unicorn machine: the contract kit, and a guest that moves while it runs and loses no write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from migfw_unicorn import UnicornMachine, program

from corefw.engine import Engine
from corefw.errors import MachineError, UsageError
from corefw.machine import MachineConfig, RunState
from corefw.memory import pagemap
from corefw.memory.logs import VARIABLE, LogKind
from corefw.plugins import Plugins
from corefw.testing.machine import CHECKS, MachineCase, check_machine
from corefw.testing.tasks import wait_until
from tests.helpers.engines import arrived, ended, query_migrate

RAM = 4 << 20


def machine(*, incoming: bool = False, ram: int = RAM) -> UnicornMachine:
    return UnicornMachine(MachineConfig(options={"ram": str(ram)}, incoming=incoming))


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: str) -> None:
    check_machine(MachineCase(lambda incoming: machine(incoming=incoming, ram=1 << 20)), only=[check])


# -- the guest ---------------------------------------------------------------------------------------------------------


def writes(guest: UnicornMachine) -> int:
    return int(str(guest.verify()["writes"]))


def test_the_guest_writes_all_of_its_counters() -> None:
    with closing(machine(ram=1 << 17)) as guest:
        assert writes(guest) == 0
        guest.start()
        assert wait_until(lambda: writes(guest) > 10 * (1 << 17) // 16)
        guest.stop(RunState.PAUSED)
        before = writes(guest)
        assert writes(guest) == before


@pytest.mark.parametrize("change", [1, -1])
def test_one_write_that_is_lost_or_repeated_is_found(change: int) -> None:
    with closing(machine()) as guest:
        guest.start()
        assert wait_until(lambda: writes(guest) > 1000)
        guest.stop(RunState.PAUSED)
        counters = np.frombuffer(guest.ram_blocks()[0].view[RAM // 2 :], dtype=np.int64)
        counters[7] += change
        with pytest.raises(MachineError, match=r"^1 of 262144 counters are wrong .*: counter 7 is "):
            guest.verify()
        del counters


def test_a_guest_that_jumps_into_nowhere_has_ended() -> None:
    with closing(machine()) as guest:
        seen: list[RunState] = []
        guest.watch(lambda _, new: seen.append(new))
        guest.ram_blocks()[0].view[:2] = b"\xff\xe0"  # jmp rax, which is 0
        guest.start()
        assert wait_until(lambda: guest.run_state is RunState.INTERNAL_ERROR)
        assert "Invalid memory" in str(guest.information()["error"])
        assert seen[-1] is RunState.INTERNAL_ERROR
        for order in (guest.start, lambda: guest.stop(RunState.PAUSED)):
            with pytest.raises(MachineError, match="the guest has ended: the CPU has stopped: Invalid memory"):
                order()


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (MachineConfig("heat.py"), "a unicorn machine runs its own program, not 'heat.py'"),
        (MachineConfig(options={"rom": "1"}), "a unicorn machine has no option 'rom'"),
        (MachineConfig(options={"ram": "3M"}), "option 'ram' is a power of two of at least 64K, got 3M"),
        (MachineConfig(allow_undeclared=True), "no undeclared state"),
    ],
)
def test_wrong_options(config: MachineConfig, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        UnicornMachine(config)


# -- the move ----------------------------------------------------------------------------------------------------------

MakeEngine = Callable[[bool], Engine]


@pytest.fixture
def engine() -> Iterator[MakeEngine]:
    with ExitStack() as stack:

        def make(incoming: bool) -> Engine:
            plugins = Plugins.load()
            made = Engine(machine(incoming=incoming), plugins, plugins.settings())
            made.set_capabilities({"return-path": True})
            return stack.enter_context(closing(made))

        yield make


def guest_of(engine: Engine) -> UnicornMachine:
    assert isinstance(engine.machine, UnicornMachine)
    return engine.machine


def reaches_pass(source: Engine, number: int) -> None:
    assert wait_until(lambda: query_migrate(source)["x-migfw"]["pass"] >= number)


def goes_on(guest: UnicornMachine, before: int) -> None:
    assert wait_until(lambda: writes(guest) > before)


@pytest.mark.parametrize("kind", LogKind)
def test_a_running_guest_moves_and_loses_no_write(
    engine: MakeEngine, kind: LogKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Move there and back, in several passes each way: each counter has exactly the writes that the registers say."""
    if kind is LogKind.PAGEMAP and (reason := pagemap.unsupported()):
        pytest.skip(reason)
    monkeypatch.setenv(VARIABLE, kind)
    here, there, back = engine(False), engine(True), engine(True)
    here.cont()
    assert wait_until(lambda: writes(guest_of(here)) > 1_000_000)
    for source, destination in ((here, there), (there, back)):
        source.set_parameters({"max-bandwidth": 100 << 20, "downtime-limit": 10})
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        reaches_pass(source, 3)
        source.set_parameters({"max-bandwidth": 1 << 40, "downtime-limit": 1000})
        assert (ended(source), arrived(destination)) == ("completed", "completed")
        pages = RAM // 2 // 4096
        assert query_migrate(source)["ram"]["normal"] > pages, "what the guest writes to went more than once"
        at = writes(guest_of(source))
        assert guest_of(destination).run_state is RunState.RUNNING
        goes_on(guest_of(destination), at)


def test_what_moves_is_what_was_there(engine: MakeEngine) -> None:
    """A paused guest arrives with the same registers, code and counters."""
    here, there = engine(False), engine(True)
    here.cont()
    assert wait_until(lambda: writes(guest_of(here)) > 1000)
    here.stop()
    here.migrate(there.migrate_incoming("tcp:127.0.0.1:0"))
    assert (ended(here), arrived(there)) == ("completed", "completed")
    assert guest_of(there).verify() == guest_of(here).verify()
    (mine,), (theirs,) = guest_of(here).devices(), guest_of(there).devices()
    assert mine.state == theirs.state
    assert bytes(there.machine.ram_blocks()[0].view[: len(program.CODE)]) == program.CODE
