"""The section 'ram': every RAM block of the machine, in passes while the guest runs.

Source: QEMU's migration/ram.c (version 4 of the section). save.py is the source's half, load.py the destination's;
handler.py joins them under the section's name.
"""

from __future__ import annotations

from collections.abc import Iterable

from corefw.hookspecs import hookimpl
from corefw.machine import Machine
from corefw.section import SectionHandler
from corefw.settings import Settings
from corefw_ram.handler import RamHandler


@hookimpl
def corefw_section_handlers(machine: Machine, settings: Settings) -> Iterable[SectionHandler]:
    return (RamHandler(machine),)
