"""The ram section keeps every promise of corefw.section, while a guest writes between the passes."""

from __future__ import annotations

from collections.abc import Callable

import corefw_ram
import numpy as np
import pytest
from corefw_ram.section import RamSectionLoader, RamSectionSaver

from corefw.channel import Interrupt
from corefw.errors import MachineError
from corefw.memory.blocks import MemfdBlock
from corefw.section import LiveLoader, Priority, RamSaver, SectionKey
from corefw.settings import Settings
from corefw.testing.recording import KitContext
from corefw.testing.section import CHECKS, SectionCase, check_section
from corefw.wire.stream import MemorySink, StreamWriter
from tests.helpers.ram import MakingMachine, StillMachine, block, noise


class OwningSaver(RamSectionSaver):
    """A saver that the test can ask for the RAM behind it."""

    def __init__(self, machine: StillMachine) -> None:
        super().__init__(machine)
        self.machine = machine


class OwningLoader(RamSectionLoader):
    def __init__(self, machine: StillMachine) -> None:
        super().__init__(machine)
        self.machine = machine


def small_source() -> OwningSaver:
    """Two pages with something in them, one of which was filled with one value; the rest was never touched."""
    ram, rom = block("ram", 6, logged=True), block("rom", 1, logged=True)
    ram.pages[2] = noise(1)
    rom.pages[0] = 0xAB
    return OwningSaver(StillMachine(ram, rom))


def small_destination() -> OwningLoader:
    ram, rom = block("ram", 6), block("rom", 1)
    ram.pages[4] = 7  # not what will come: it has to be zeroed
    return OwningLoader(StillMachine(ram, rom))


def large_source() -> OwningSaver:
    """600 pages: full ones and zero ones in runs and in turns, touched and not."""
    ram = block("ram", 600, logged=True)
    ram.pages[:200] = noise(200)
    ram.pages[200:400:2] = noise(100, seed=2)
    ram.pages[450:470] = 0
    ram.pages[470:480] = 1
    return OwningSaver(StillMachine(ram, block("empty", 40, logged=True)))


def large_destination() -> OwningLoader:
    return OwningLoader(StillMachine(block("ram", 600), block("empty", 40)))


def guest_writes(owner: OwningSaver) -> None:
    """Counts in its pages, so that what is lost shows; empties one, and touches one that nobody had touched."""
    pages = owner.machine.blocks[0].pages
    pages[[1, 2, len(pages) - 1], 5] += 1
    pages[0] = np.uint8(0) if pages[0, 0] else np.uint8(9)


def case(
    saver: Callable[[], OwningSaver], loader: Callable[[], OwningLoader], samples: int, budget: int
) -> SectionCase:
    return SectionCase(
        saver=saver,
        loader=loader,
        state=lambda owner: owner.machine.contents(),
        change=guest_writes,
        close=lambda owner: owner.machine.close(),
        samples=samples,
        budget=budget,
        memory=16 << 20,
    )


CASES = {
    "small": case(small_source, small_destination, 400, 1),
    "large": case(large_source, large_destination, 120, 64 << 10),
    "blocks made from the stream": case(small_source, lambda: OwningLoader(MakingMachine(limit=1 << 20)), 200, 8192),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, check: str) -> None:
    assert check_section(CASES[name], only=[check]) == [check]


def test_the_plugin_gives_one_section_that_every_stream_must_have() -> None:
    with StillMachine(block("ram", 1)) as machine:
        (saver,) = corefw_ram.corefw_section_savers(machine, Settings())
        (loader,) = corefw_ram.corefw_section_loaders(machine, Settings())
        assert isinstance(saver, RamSaver)
        assert isinstance(loader, LiveLoader)
        assert saver.key == loader.key == SectionKey("ram", 0)
        assert (saver.version_id, saver.priority) == (4, Priority.RAM)
        assert (loader.version_id, loader.minimum_version) == (4, 4)
        assert loader.required()
        assert saver.active()


@pytest.mark.parametrize("incoming", [False, True])
def test_other_pages_than_the_streams_are_refused(incoming: bool) -> None:
    with StillMachine(MemfdBlock("wide", 1 << 16, page_size=1 << 14)) as machine:
        context = KitContext(Settings(), Interrupt())
        with pytest.raises(MachineError, match="'wide' has pages of 16384 bytes, expected 4096"):
            if incoming:
                RamSectionLoader(machine).setup(context)
            else:
                RamSectionSaver(machine).setup(StreamWriter(MemorySink()), context)
