"""Device state: one section for each of the machine's devices, and the section 'globalstate'."""

from __future__ import annotations

from collections.abc import Iterable

from corefw.hookspecs import hookimpl
from corefw.machine import Machine, ParkingMachine
from corefw.section import SectionLoader, SectionSaver
from corefw.settings import Settings
from corefw_devices.device import DeviceLoader, DeviceSaver, device_section
from corefw_devices.globalstate import GlobalStateLoader, GlobalStateSaver


@hookimpl
def corefw_section_savers(machine: Machine, settings: Settings) -> Iterable[SectionSaver]:
    """Make the savers. A parked machine needs none: it stores the run state among its sections."""
    if not isinstance(machine, ParkingMachine):
        yield GlobalStateSaver(settings)
    for device in machine.devices():
        yield DeviceSaver(*device_section(machine, device))


@hookimpl
def corefw_section_loaders(machine: Machine) -> Iterable[SectionLoader]:
    if not isinstance(machine, ParkingMachine):
        yield GlobalStateLoader()
    for device in machine.devices():
        yield DeviceLoader(*device_section(machine, device))
