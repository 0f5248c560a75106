"""What a real QEMU has sent: the same RAM as a plain reading of its records gives, and sent on from here once more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from corefw.errors import RemoteStreamError
from corefw.wire import items
from corefw.wire.constants import RAM_IDSTR, RamFlag
from corefw.wire.decoder import decode
from corefw.wire.items import encode
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.golden.record import RECORDINGS
from tests.golden.record import load as recorded
from tests.helpers.ram import PAGE, MakingMachine, Sender, StillMachine, apply, block, load, page_records

FOREIGN = {
    "pc-xbzrle": "switch capability 'xbzrle' off on the source",
    "pc-compress": "switch capability 'compress' off on the source",
}
"""Streams with pages that are encoded, which is another plugin's business."""

TAKEN = sorted(RECORDINGS.keys() - FOREIGN.keys() - {"pc-postcopy"})


def ram_bodies(name: str) -> list[bytes]:
    """The bodies of section 'ram' in a recorded stream."""
    return list(_ram_bodies(recorded(name)))


def _ram_bodies(stream: bytes) -> Iterator[bytes]:
    held: list[items.Item] = []
    for item in decode(StreamReader(MemorySource(stream))):
        if not isinstance(item, items.Ram):
            continue
        held.append(item)
        if item.record.kind is RamFlag.EOS:
            sink = MemorySink()
            encode(StreamWriter(sink), held)
            yield bytes(sink.data)
            held.clear()


def plainly(bodies: list[bytes], machine: MakingMachine) -> dict[str, bytearray]:
    contents = {one.idstr: bytearray(one.length) for one in machine.blocks}
    apply(page_records(*bodies), contents)
    return contents


@pytest.mark.parametrize("name", TAKEN)
def test_ram_arrives(name: str) -> None:
    bodies = ram_bodies(name)
    with MakingMachine() as machine:
        load(machine, *bodies)
        assert machine.contents() == plainly(bodies, machine)
        assert sum(one.length for one in machine.blocks) >= 1 << 20


@pytest.mark.parametrize("sizes", [(1,), (4095, 3), (70_000,)], ids=str)
def test_ram_arrives_in_any_portions(sizes: tuple[int, ...]) -> None:
    bodies = ram_bodies("pc-passes")
    with MakingMachine() as machine:
        load(machine, *bodies, sizes=sizes, buffer=PAGE * 3)
        assert machine.contents() == plainly(bodies, machine)


def test_the_guest_s_counters_arrive() -> None:
    """rom.asm counts in the first byte of 16 pages, one after the other: at any moment some are one ahead."""
    bodies = ram_bodies("pc-passes")
    sent = [record.page for record in page_records(*bodies) if record.block == "pc.ram"]
    assert max(sent.count(page) for page in range(16, 32)) >= RECORDINGS["pc-passes"].passes - 1
    with MakingMachine() as machine:
        load(machine, *bodies)
        (ram,) = (one for one in machine.blocks if one.idstr == "pc.ram")
        counters = ram.pages[16:32, 0]
        steps = np.diff(counters, append=counters[:1])
        assert counters.any()
        assert sorted(set(steps.tolist()) - {0}) in ([], [1, 255])
        assert np.count_nonzero(steps) <= 2
        assert not ram.pages[16:32, 1:].any()


@pytest.mark.parametrize("name", ["pc-passes", "q35"])
def test_it_goes_on_from_here(name: str) -> None:
    with MakingMachine() as machine:
        load(machine, *ram_bodies(name))
        with Sender(machine) as sender:
            bodies = [sender.setup(), sender.part(1 << 16), sender.part(), sender.end()]
        with StillMachine(*(block(one.idstr, one.length // PAGE) for one in machine.blocks)) as next_one:
            load(next_one, *bodies)
            assert next_one.contents() == machine.contents()


@pytest.mark.parametrize("name", FOREIGN)
def test_pages_that_are_encoded_are_refused_with_what_to_do(name: str) -> None:
    bodies = ram_bodies(name)
    with MakingMachine() as machine, pytest.raises(RemoteStreamError, match=FOREIGN[name]) as caught:
        load(machine, *bodies)
    assert caught.value.where == f"section '{RAM_IDSTR}'"
