"""The section 'ram': every RAM block of the machine, in passes while the guest runs.

save.py is the source's half, load.py the destination's; section.py has the classes that the engine calls.
Source: QEMU 10.0, migration/ram.c (version 4 of the section).
"""

from __future__ import annotations

from collections.abc import Iterable

from corefw.hookspecs import hookimpl
from corefw.machine import Machine
from corefw.section import SectionLoader, SectionSaver
from corefw.settings import Settings
from corefw_ram.section import RamSectionLoader, RamSectionSaver


@hookimpl
def corefw_section_savers(machine: Machine, settings: Settings) -> Iterable[SectionSaver]:
    return (RamSectionSaver(machine),)


@hookimpl
def corefw_section_loaders(machine: Machine, settings: Settings) -> Iterable[SectionLoader]:
    return (RamSectionLoader(machine),)
