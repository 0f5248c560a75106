"""Tools of the contract kit for machines: the machines of one check, and the table of checks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Final

from corefw.machine import Machine, RunState
from corefw.testing.kit import Kit
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter


@dataclass(frozen=True, slots=True)
class MachineCase:
    """The machine to check.

    make      makes a machine, as `factory(config)` does; the argument is whether it is incoming. Two of them have to
              fit each other: same name, same RAM blocks. Keep the RAM small
    seconds   for which the guest runs at a time, enough to write to its RAM
    """

    make: Callable[[bool], Machine]
    seconds: float = 0.1


class Bench:
    """The machines of one check."""

    def __init__(self, case: MachineCase) -> None:
        self._case = case
        self._made: list[Machine] = []

    def machine(self, *, incoming: bool = False) -> Machine:
        machine = self._case.make(incoming)
        self._made.append(machine)
        return machine

    def running(self) -> Machine:
        """A machine whose guest has run for a while."""
        machine = self.machine()
        machine.start()
        self.wait()
        return machine

    def wait(self) -> None:
        time.sleep(self._case.seconds)

    def close(self) -> None:
        for machine in self._made:
            machine.close()


KIT: Final[Kit[MachineCase]] = Kit()


def check(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """Add a check, which gets a bench of its own."""

    @wraps(function)
    def run(case: MachineCase) -> None:
        bench = Bench(case)
        try:
            function(bench)
            bench.close()
        finally:
            with contextlib.suppress(Exception):  # raised above, unless the check failed before
                bench.close()

    KIT.check(run)
    return function


def assert_state(machine: Machine, expected: RunState, after: str) -> None:
    assert machine.run_state is expected, f"the run state after {after} is {machine.run_state}, not {expected}"


def save_devices(machine: Machine) -> dict[tuple[str, int], bytes]:
    """The bytes that each device writes into its section."""
    saved = {}
    for device in machine.devices():
        assert device.vmstate.unmigratable is None, f"device '{device.name}': {device.vmstate.unmigratable}"
        sink = MemorySink()
        writer = StreamWriter(sink)
        device.vmstate.save(writer, device.state)
        writer.flush()
        saved[device.name, device.instance_id] = bytes(sink.data)
    return saved


def load_devices(machine: Machine, saved: dict[tuple[str, int], bytes]) -> None:
    for device in machine.devices():
        # In a stream something always follows a section, and the reader looks at it.
        reader = StreamReader(
            MemorySource(saved[device.name, device.instance_id] + b"\0"), where=f"device '{device.name}'"
        )
        device.vmstate.load(reader, device.state, device.vmstate.version_id)
