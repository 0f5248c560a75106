"""Finds the parts of a machine that no section carries: a migration that would leave one behind is refused.

A saver or loader names the RAM blocks and devices that it carries (`Section.covers`). The source asks before anything
is sent, the destination before it listens and again at the end of the stream, then for the sections that came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from corefw.errors import PluginError
from corefw.machine import Machine, RamMakingMachine, RunState
from corefw.section import Coverage, LiveLoader, Section, SectionKey, SectionLoader

_SHOWN = 3
_WHO = {"RAM": "migfw-ram", "device": "migfw-devices"}


def uncovered(machine: Machine, sections: Iterable[Section]) -> list[str]:
    """A phrase for the RAM and one for the devices that none of these sections carries; empty if all of it is carried.

    Raises PluginError if a section's covers() returns anything but a Coverage.
    """
    total = _total(sections)
    found = []
    blocks = [f"'{block.idstr}'" for block in machine.ram_blocks() if block.idstr not in total.ram_blocks]
    if blocks:
        found.append(_no_plugin("RAM", "RAM block", blocks))
    elif isinstance(machine, RamMakingMachine) and machine.run_state is RunState.INMIGRATE and not total.new_ram_blocks:
        found.append(_no_plugin("RAM", "whatever RAM the stream brings", []))
    if devices := [str(key) for key in _device_keys(machine) if key not in total.devices]:
        found.append(_no_plugin("device", "device", devices))
    return found


def not_loaded(
    machine: Machine, loaders: Iterable[SectionLoader], was_loaded: Callable[[SectionLoader], bool]
) -> str | None:
    """At the end of a stream, a RAM block or device that it did not bring, as a phrase for an error; else None.

    The section of a device may be missing if its loader does not require it; RAM may not.
    """
    loaders = list(loaders)
    loaded = _total(loader for loader in loaders if was_loaded(loader))
    excused = _total(
        loader
        for loader in loaders
        if not isinstance(loader, LiveLoader) and not loader.required() and not was_loaded(loader)
    )
    for block in machine.ram_blocks():
        if block.idstr not in loaded.ram_blocks:
            return f"RAM block '{block.idstr}'"
    for key in _device_keys(machine):
        if key not in loaded.devices | excused.devices:
            return f"device {key}"
    return None


def _device_keys(machine: Machine) -> list[SectionKey]:
    return [SectionKey(device.name, device.instance_id) for device in machine.devices()]


def _total(sections: Iterable[Section]) -> Coverage:
    each = []
    for section in sections:
        coverage = section.covers()
        if not isinstance(coverage, Coverage):
            raise PluginError(f"section {section.key}: covers() gave {type(coverage).__name__}, expected a Coverage")
        each.append(coverage)
    return Coverage(
        ram_blocks=frozenset().union(*(one.ram_blocks for one in each)),
        devices=frozenset().union(*(one.devices for one in each)),
        new_ram_blocks=any(one.new_ram_blocks for one in each),
    )


def _no_plugin(kind: str, what: str, names: list[str]) -> str:
    listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    several = "s" if len(names) > 1 else ""
    return (
        f"no plugin carries {what}{several}{' ' if listed else ''}{listed}"
        f" (install {_WHO[kind]}, or the plugin that belongs to the machine; 'migfw plugins' lists what is installed)"
    )
