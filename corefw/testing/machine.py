"""The contract kit for machines: checks that a machine keeps the contract of corefw.machine.

    from corefw.testing.machine import CHECKS, MachineCase, check_machine

    CASE = MachineCase(lambda incoming: MyMachine(MachineConfig(incoming=incoming)))

    @pytest.mark.parametrize("check", CHECKS)
    def test_contract(check):
        check_machine(CASE, only=[check])

Each check states one promise of the interface, uses machines for real, and fails with an AssertionError that says in
one line what was promised and what happened. After each check every machine is closed, and no descriptor, process or
thread may be left behind. Only verify() shows whether a guest continues correctly: the kit warns (UncheckedExecution)
if a machine has none, or if it misses a lost write. It needs no test framework.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from corefw.testing import machine_disks, machine_memory, machine_postcopy, machine_running, machine_verify
from corefw.testing.machine_bench import KIT, Bench, MachineCase
from corefw.testing.machine_verify import UncheckedExecution

__all__ = ["CHECKS", "MachineCase", "UncheckedExecution", "check_machine"]

_MODULES: Final = (machine_running, machine_memory, machine_verify, machine_postcopy, machine_disks)
"""Importing these modules adds their checks."""

CHECKS: Final = KIT.checks
"""Every check by name, in the order in which they run."""


def check_machine(case: MachineCase, *, only: Collection[str] | None = None) -> list[str]:
    """Run every check (or `only` these) on machines of this case; the names of those that were run.

    Raises AssertionError for the first promise that is broken.
    """
    first = Bench(case)
    first.machine()  # before anything is counted: libraries make things once for a whole process
    first.close()
    return KIT.run(case, only)
