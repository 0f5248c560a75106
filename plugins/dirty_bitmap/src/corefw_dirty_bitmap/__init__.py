"""The section 'dirty-bitmap': the dirty bitmaps of a machine's block nodes (capability dirty-bitmaps).

save.py is the source's half, load.py the destination's, and mapping.py the parameter block-bitmap-mapping, which
renames nodes and bitmaps in the stream. Source: QEMU 10.0, migration/block-dirty-bitmap.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from corefw.declarations import Declarations, Value
from corefw.hookspecs import hookimpl
from corefw.machine import BlockMachine, Machine, ParkingMachine
from corefw.section import SectionLoader, SectionSaver
from corefw.settings import Settings
from corefw_dirty_bitmap.load import BitmapLoader
from corefw_dirty_bitmap.mapping import MAPPING, wrong_mapping
from corefw_dirty_bitmap.save import BitmapSaver, bitmaps_to_send, left_behind, unusable

CAPABILITY = "dirty-bitmaps"


def _check_mapping(_: Mapping[str, bool], parameters: Mapping[str, Value]) -> str | None:
    return wrong_mapping(parameters[MAPPING])


@hookimpl
def corefw_settings() -> Declarations:
    return Declarations(implements=frozenset({CAPABILITY, MAPPING}), checks=(_check_mapping,))


@hookimpl
def corefw_section_savers(machine: Machine, settings: Settings) -> Iterable[SectionSaver]:
    return (BitmapSaver(machine, settings),) if isinstance(machine, BlockMachine) else ()


@hookimpl
def corefw_section_loaders(machine: Machine, settings: Settings) -> Iterable[SectionLoader]:
    return (BitmapLoader(machine, settings),) if isinstance(machine, BlockMachine) else ()


@hookimpl
def corefw_blockers(machine: Machine, settings: Settings) -> Iterable[str]:
    """Name bitmaps that cannot be sent, and those that a parked machine would lose."""
    if not isinstance(machine, BlockMachine):
        return ()
    if settings.capability(CAPABILITY):
        return unusable(bitmaps_to_send(machine, settings))
    return left_behind(machine) if isinstance(machine, ParkingMachine) else ()
