"""The hooks that concern every migration of a python guest."""

from __future__ import annotations

from collections.abc import Iterable

from corefw.hookspecs import hookimpl
from corefw.machine import Machine
from corefw.section import SectionLoader, SectionSaver
from corefw.settings import Settings
from corefw_machine_python.layoutsection import LayoutLoader, LayoutSaver
from corefw_machine_python.machine import PythonMachine


@hookimpl
def corefw_blockers(machine: Machine, settings: Settings) -> Iterable[str]:
    """Block a migration that would leave undeclared state behind."""
    del settings
    return machine.blockers() if isinstance(machine, PythonMachine) else ()


@hookimpl
def corefw_section_savers(machine: Machine) -> Iterable[SectionSaver]:
    """Send the program's layout before everything else."""
    if not isinstance(machine, PythonMachine):
        return ()
    return (LayoutSaver(machine.layout, lambda: machine.stop_cost, machine.block_nodes()),)


@hookimpl
def corefw_section_loaders(machine: Machine) -> Iterable[SectionLoader]:
    return (LayoutLoader(machine.layout),) if isinstance(machine, PythonMachine) else ()
