"""The ram handler keeps every promise of corefw.section, while a guest writes between the passes."""

from __future__ import annotations

from collections.abc import Callable

import corefw_ram
import numpy as np
import pytest
from corefw_ram.handler import RamHandler

from corefw.channel import Interrupt
from corefw.errors import MachineError
from corefw.memory.blocks import MemfdBlock
from corefw.section import LiveHandler, Priority, SectionKey
from corefw.settings import Settings
from corefw.testing.handler import CHECKS, HandlerCase, check_handler
from corefw.testing.recording import KitContext
from corefw.wire.stream import MemorySink, StreamWriter
from tests.helpers.ram import MakingMachine, StillMachine, block, noise


class Owner(RamHandler):
    """A handler that the test can ask for the RAM behind it."""

    def __init__(self, machine: StillMachine) -> None:
        super().__init__(machine)
        self.machine = machine


def small_source() -> Owner:
    """Two pages with something in them, one of which was filled with one value; the rest was never touched."""
    ram, rom = block("ram", 6, logged=True), block("rom", 1, logged=True)
    ram.pages[2] = noise(1)
    rom.pages[0] = 0xAB
    return Owner(StillMachine(ram, rom))


def small_destination() -> Owner:
    ram, rom = block("ram", 6), block("rom", 1)
    ram.pages[4] = 7  # not what will come: it has to be zeroed
    return Owner(StillMachine(ram, rom))


def large_source() -> Owner:
    """600 pages: full ones and zero ones in runs and in turns, touched and not."""
    ram = block("ram", 600, logged=True)
    ram.pages[:200] = noise(200)
    ram.pages[200:400:2] = noise(100, seed=2)
    ram.pages[450:470] = 0
    ram.pages[470:480] = 1
    return Owner(StillMachine(ram, block("empty", 40, logged=True)))


def large_destination() -> Owner:
    return Owner(StillMachine(block("ram", 600), block("empty", 40)))


def guest_writes(owner: Owner) -> None:
    """Counts in its pages, so that what is lost shows; empties one, and touches one that nobody had touched."""
    pages = owner.machine.blocks[0].pages
    pages[[1, 2, len(pages) - 1], 5] += 1
    pages[0] = np.uint8(0) if pages[0, 0] else np.uint8(9)


def case(source: Callable[[], Owner], destination: Callable[[], Owner], samples: int, budget: int) -> HandlerCase:
    return HandlerCase(
        source=source,
        destination=destination,
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
    "blocks made from the stream": case(small_source, lambda: Owner(MakingMachine(limit=1 << 20)), 200, 8192),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, check: str) -> None:
    assert check_handler(CASES[name], only=[check]) == [check]


def test_the_plugin_gives_one_handler_that_every_stream_must_have() -> None:
    with StillMachine(block("ram", 1)) as machine:
        (handler,) = corefw_ram.corefw_section_handlers(machine, Settings())
        assert isinstance(handler, LiveHandler)
        assert handler.key == SectionKey("ram", 0)
        assert (handler.version_id, handler.minimum_version, handler.priority) == (4, 4, Priority.RAM)
        assert handler.required()
        assert handler.active()


@pytest.mark.parametrize("incoming", [False, True])
def test_other_pages_than_the_streams_are_refused(incoming: bool) -> None:
    with StillMachine(MemfdBlock("wide", 1 << 16, page_size=1 << 14)) as machine:
        handler = RamHandler(machine)
        context = KitContext(Settings(), Interrupt())
        with pytest.raises(MachineError, match="'wide' has pages of 16384 bytes, expected 4096"):
            handler.load_setup(context) if incoming else handler.setup(StreamWriter(MemorySink()), context)
