"""The machine "python": an ordinary Python program as the guest.

    guest          what a program's author writes against: Program, array, field, value, rng, section, disk, option
    declarations   what a program class declares, checked; nothing here runs user code
    values         guest.value, guest.rng and guest.section; jsonlike is the text form of the first two
    layout         what a program consists of, compared between two sides; layoutsection sends it
    requirements   the versions that a program requires
    loading        from "heat.py:Heat" to the class
    forking        what becomes of the arrays in a process that the guest forks
    protocol       the messages between the engine and the guest's process
    disks          guest.disk; writelog tells the engine what was written, disknode is the engine's half
    handover       the values of fields and sections, to and from the engine
    guestmain      the guest's process: maps the arrays, runs the program
    undeclared     finds state that the program has not declared
    process        the engine's end of it: spawns, asks, hears of its death
    table          a program's fields and sections as VMStates
    machine        PythonMachine, put together from these
    hooks          what it adds to the engine
    programs       the bundled programs

The guest imports this package too, so the engine's half is loaded only when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corefw_machine_python.machine import PythonMachine

__all__ = ["PythonMachine"]


def __getattr__(name: str) -> object:
    if name == "PythonMachine":
        from corefw_machine_python.machine import PythonMachine  # noqa: PLC0415 - see above

        return PythonMachine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
