"""The section keeps the contract of corefw.section while a guest writes to its disks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from corefw_dirty_bitmap import corefw_settings
from corefw_dirty_bitmap.load import BitmapLoader
from corefw_dirty_bitmap.save import BitmapSaver

from corefw.machine import BlockMachine
from corefw.settings import Settings
from corefw.testing.section import CHECKS, SectionCase, check_section
from tests.helpers.disks import MIB, Disk, DiskMachine, DiskMakingMachine, state_of

SETTINGS = Settings([corefw_settings()])
SETTINGS.set_capabilities({"dirty-bitmaps": True})


class OwningSaver(BitmapSaver):
    """A saver that gives the test access to its machine."""

    def __init__(self, machine: DiskMachine) -> None:
        super().__init__(machine, SETTINGS)
        self.machine = machine


class OwningLoader(BitmapLoader):
    def __init__(self, machine: DiskMachine | DiskMakingMachine) -> None:
        super().__init__(machine, SETTINGS)
        self.machine = machine


def source() -> OwningSaver:
    system, data = Disk("system", 40 * MIB), Disk("data", 3 * MIB + 512)
    system.add_bitmap("backup", 65536)
    system.add_bitmap("fine", 512)
    system.add_bitmap("off", 4096, enabled=False, persistent=True)
    data.add_bitmap("backup", 1024, persistent=True)
    system.write(5 * MIB, 6 * MIB)
    data.write(0, 1)
    return OwningSaver(DiskMachine(system, data))


def destination() -> OwningLoader:
    return OwningLoader(DiskMachine(Disk("system", 40 * MIB), Disk("data", 3 * MIB + 512), incoming=True))


def guest_writes(owner: OwningSaver) -> None:
    """Write again to where the guest has written, and after that place."""
    for disk in owner.machine.disks:
        first = disk.bitmap("backup").count()
        disk.write(first, first + 10_000)
    owner.machine.disks[1].write(3 * MIB, 3 * MIB + 512)


def case(loader: Callable[[], OwningLoader], budget: int) -> SectionCase:
    def state(owner: OwningSaver | OwningLoader) -> object:
        machine: BlockMachine = owner.machine
        return state_of(machine)

    return SectionCase(
        saver=source,
        loader=loader,
        state=state,
        change=guest_writes,
        close=lambda owner: owner.machine.close(),
        samples=100,
        budget=budget,
        memory=8 << 20,
    )


CASES = {
    "known disks": case(destination, 1),
    "disks made from the stream": case(lambda: OwningLoader(DiskMakingMachine()), 4096),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, check: str) -> None:
    assert check_section(CASES[name], only=[check]) == [check]
