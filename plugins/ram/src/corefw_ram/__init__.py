"""The section 'ram': every RAM block of the machine, in passes while the guest runs.

save.py is the source's half, load.py the destination's; postcopy_save.py and postcopy_load.py add what goes on once the
guest runs on the destination; section.py has the classes that the engine calls.
Source: QEMU 10.0, migration/ram.c (version 4 of the section).
"""

from __future__ import annotations

from collections.abc import Iterable

from corefw.declarations import Declarations
from corefw.hookspecs import hookimpl
from corefw.machine import Machine
from corefw.section import SectionLoader, SectionSaver
from corefw.settings import Settings
from corefw_ram.section import RamSectionLoader, RamSectionSaver


@hookimpl
def corefw_settings() -> Declarations:
    return Declarations(
        implements=frozenset({"postcopy-ram", "postcopy-preempt", "release-ram", "max-postcopy-bandwidth"})
    )


@hookimpl
def corefw_section_savers(machine: Machine, settings: Settings) -> Iterable[SectionSaver]:
    return (RamSectionSaver(machine),)


@hookimpl
def corefw_section_loaders(machine: Machine, settings: Settings) -> Iterable[SectionLoader]:
    return (RamSectionLoader(machine),)
