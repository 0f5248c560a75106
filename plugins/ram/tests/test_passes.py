"""Both halves together, while the guest writes: whatever it does, the destination's RAM is the source's in the end."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from corefw.memory import pagemap
from corefw.memory.blocks import MemfdBlock
from corefw.memory.pagemap import PagemapLog, open_tracker
from tests.helpers.ram import PAGE, Sender, StillMachine, ToldLog, block, load, noise, page_records

needs_pagemap = pytest.mark.skipif(pagemap.unsupported() is not None, reason=f"PAGEMAP_SCAN: {pagemap.unsupported()}")
LENGTHS = {"ram": 90, "rom": 1, "vga": 33}


def received(bodies: list[bytes], lengths: dict[str, int]) -> dict[str, bytes]:
    """What a destination with these blocks has in the end."""
    with StillMachine(*(block(idstr, pages) for idstr, pages in lengths.items())) as machine:
        load(machine, *bodies)
        return machine.contents()


# -- any guest -----------------------------------------------------------------------------------------------------

# (block, first page, pages, value): 0 empties, 255 fills with noise, another value counts.
writes = st.tuples(
    st.sampled_from(list(LENGTHS)), st.integers(0, 89), st.integers(1, 90), st.sampled_from([0, 1, 1, 255])
)
passes = st.lists(st.lists(writes, max_size=4), min_size=1, max_size=6)
budgets = st.lists(st.integers(1, 200_000), min_size=1, max_size=4)


def write(machine: StillMachine, wish: tuple[str, int, int, int]) -> None:
    idstr, first, count, value = wish
    (one,) = (one for one in machine.blocks if one.idstr == idstr)
    pages = one.pages[first : first + count]
    if isinstance(one.dirty_log, ToldLog):
        one.dirty_log.tell(first, min(first + count, len(one.pages)))
    if value == 1:
        pages[:, 11] += 1
    else:
        pages[:] = noise(len(pages), seed=first) if value else 0


@settings(max_examples=80)
@given(
    before=st.lists(writes, max_size=3), passes=passes, budgets=budgets, harvest=st.booleans(), notified=st.booleans()
)
def test_any_writes_between_the_parts_arrive(
    before: list[tuple[str, int, int, int]],
    passes: list[list[tuple[str, int, int, int]]],
    budgets: list[int],
    harvest: bool,
    notified: bool,
) -> None:
    """With a log that has to know what was sent, and with one that knows of every write (`notified`)."""
    with StillMachine(*(block(idstr, pages, logged=True) for idstr, pages in LENGTHS.items())) as machine:
        if notified:
            for one in machine.blocks:
                one.dirty_log = ToldLog()
        for wish in before:
            write(machine, wish)
        with Sender(machine, gathers=True) as sender:
            bodies = [sender.setup()]
            for turn, wishes in enumerate(passes):
                for wish in wishes:
                    write(machine, wish)
                sender.harvest() if harvest else sender.estimate()
                bodies.append(sender.part(budgets[turn % len(budgets)]))
            bodies.append(sender.end())
            assert sender.harvest() == 0
        assert received(bodies, LENGTHS) == machine.contents()


# -- writes at bad moments ------------------------------------------------------------------------------------------


class Guest:
    """One block with a log of each kind, and the mapping of it that a guest would write to."""

    def __init__(self, stack: ExitStack, pages: int, kind: str) -> None:
        self.block: MemfdBlock = block("ram", pages, logged=True)
        self.machine = stack.enter_context(StillMachine(self.block))
        self.pages: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self.block.fd, pages * PAGE), np.uint8).reshape(
            -1, PAGE
        )
        if kind == "pagemap":
            tracker = open_tracker()
            stack.callback(tracker.close)
            self.block.dirty_log = PagemapLog(tracker, self.pages.ctypes.data, self.block.length)

    def arrives(self, *bodies: bytes) -> bool:
        return received(list(bodies), {"ram": len(self.pages)}) == self.machine.contents()


@pytest.fixture(params=["hashes", pytest.param("pagemap", marks=needs_pagemap)])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    with ExitStack() as stack:
        yield Guest(stack, 600, request.param)


def test_a_page_that_is_written_after_it_was_sent_is_sent_again(guest: Guest) -> None:
    guest.pages[:] = noise(600)
    with Sender(guest.machine, gathers=True) as sender:
        bodies = [sender.setup(), sender.part(300 * PAGE)]
        sent = {record.page for record in page_records(bodies[1])}
        assert {0, 250} <= sent
        assert 599 not in sent
        guest.pages[[0, 250, 599], 7] += 1
        bodies += [sender.part(), sender.end()]
        last = 599  # was still to come, so it may go once or twice
        pages = sorted(record.page for record in page_records(*bodies))
        assert [page for page in pages if page != last] == sorted([*range(last), 0, 250])
    assert guest.arrives(*bodies)


def test_pages_that_are_written_while_they_are_on_their_way_are_sent_again(guest: Guest) -> None:
    """The guest writes to all of its RAM each time when the channel takes a part, before the bytes are taken."""
    guest.pages[:500] = noise(500)

    stopped = threading.Event()

    def guest_writes() -> None:
        if not stopped.is_set():
            guest.pages[:, 9] += 1

    with Sender(guest.machine, on_send=guest_writes, gathers=True) as sender:
        bodies = [sender.setup(), sender.part()]
        assert sender.harvest() == 600 * PAGE
        bodies.append(sender.part(100 * PAGE))
        stopped.set()
        bodies.append(sender.end())
    assert guest.arrives(*bodies)


def test_a_page_that_becomes_what_it_was_before_it_was_sent(guest: Guest) -> None:
    """Nothing tells it apart from one that never changed, but for what was sent in between."""
    guest.pages[:] = noise(600)
    before = guest.pages[40:50].copy()
    with Sender(guest.machine, gathers=True) as sender:
        bodies = [sender.setup()]
        guest.pages[40:50] = 1
        bodies.append(sender.part())
        guest.pages[40:50] = before
        bodies.append(sender.end())
    assert guest.arrives(*bodies)


def test_pages_that_are_emptied_and_filled(guest: Guest) -> None:
    guest.pages[100:200] = noise(100)
    with Sender(guest.machine, gathers=True) as sender:
        bodies = [sender.setup(), sender.part()]
        guest.pages[150:300] = 0
        guest.pages[400:500] = noise(100)
        sender.harvest()
        bodies.append(sender.part())
        guest.pages[400:500] = 0
        guest.pages[599] = 1
        bodies.append(sender.end())
    assert guest.arrives(*bodies)


def test_a_second_migration_begins_anew(guest: Guest) -> None:
    """The first is cancelled in the middle; what was written before and after all arrives by the second."""
    guest.pages[:300] = noise(300)
    with Sender(guest.machine, gathers=True) as sender:
        sender.setup()
        sender.part(100 * PAGE)
        guest.pages[290:310] = 3
        sender.harvest()
    guest.pages[0] = 0
    with Sender(guest.machine, gathers=True) as sender:
        bodies = [sender.setup(), sender.part()]
        guest.pages[1] = 5
        bodies.append(sender.end())
        assert sender.statistics.total_bytes == 600 * PAGE
    assert guest.arrives(*bodies)
