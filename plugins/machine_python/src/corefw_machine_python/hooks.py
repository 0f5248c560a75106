"""The hooks that concern every migration of a python guest."""

from __future__ import annotations

from collections.abc import Iterable

from corefw.hookspecs import hookimpl
from corefw.machine import Machine
from corefw.section import SectionHandler
from corefw.settings import Settings
from corefw_machine_python.layoutsection import LayoutHandler
from corefw_machine_python.machine import PythonMachine


@hookimpl
def corefw_blockers(machine: Machine, settings: Settings) -> Iterable[str]:
    """Block a migration that would leave undeclared state behind."""
    del settings
    return machine.blockers() if isinstance(machine, PythonMachine) else ()


@hookimpl
def corefw_section_handlers(machine: Machine, settings: Settings) -> Iterable[SectionHandler]:
    """Send the program's layout before everything else."""
    del settings
    return (LayoutHandler(machine.layout, lambda: machine.farewell),) if isinstance(machine, PythonMachine) else ()
