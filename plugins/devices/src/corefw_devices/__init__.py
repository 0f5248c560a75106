"""Device state: one section for each of the machine's devices, and the section 'globalstate'.

handler.py joins a device's table (corefw.wire.vmstate) to the engine; globalstate.py is the same for the run state.
"""

from __future__ import annotations

from collections.abc import Iterable

from corefw.hookspecs import hookimpl
from corefw.machine import AdoptsStreams, Machine
from corefw.section import SectionHandler
from corefw.settings import Settings
from corefw_devices.globalstate import GlobalStateHandler
from corefw_devices.handler import DeviceHandler


@hookimpl
def corefw_section_handlers(machine: Machine, settings: Settings) -> Iterable[SectionHandler]:
    """A machine that adopts streams has the run state among the sections that it stores, and sends it on with them."""
    if not isinstance(machine, AdoptsStreams):
        yield GlobalStateHandler(settings)
    for device in machine.devices():
        yield DeviceHandler.of(machine, device)
