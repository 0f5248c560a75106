"""The source's half: its bytes, one by one; what it leaves alone; how it counts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from corefw.memory.blocks import NeverDirty
from corefw.wire.constants import RamFlag
from tests.helpers.ram import (
    EOS,
    PAGE,
    PageRecord,
    Sender,
    StillMachine,
    ToldLog,
    allocated,
    block,
    noise,
    page_records,
)

MIB = 1 << 20
BATCH = MIB
"""Bytes by which a PART may be more than its budget: no batch of pages is larger."""

A_PAGE = bytes(range(1, 129)) * 32


Sending = Callable[[StillMachine], Sender]


@pytest.fixture(params=[False, True], ids=["copied", "from where it is"])
def sending(request: pytest.FixtureRequest) -> Sending:
    return partial(Sender, gathers=request.param)


# -- bytes ---------------------------------------------------------------------------------------------------------


def test_start_lists_the_blocks(sending: Sending) -> None:
    with StillMachine(block("pc.ram", 16), block("/rom@etc/acpi/tables", 1)) as machine, sending(machine) as sender:
        assert sender.setup() == (
            b"\0\0\0\0\0\1\x10\4"  # the sum of the lengths | MEM_SIZE
            b"\6pc.ram\0\0\0\0\0\1\0\0"
            b"\x14/rom@etc/acpi/tables\0\0\0\0\0\0\x10\0"
            b"\0\0\0\0\0\0\0\x10"  # EOS
        )


def test_a_machine_without_ram(sending: Sending) -> None:
    with StillMachine() as machine, sending(machine) as sender:
        assert sender.setup() == b"\0\0\0\0\0\0\0\4" + EOS
        assert sender.harvest() == 0
        assert sender.end() == b"\0\0\0\0\0\0\0\x10"


def test_the_first_record_names_its_block_and_the_others_go_on_with_it(sending: Sending) -> None:
    with StillMachine(block("ram", 4)) as machine, sending(machine) as sender:
        machine.blocks[0].pages[:3] = np.frombuffer(A_PAGE, dtype=np.uint8)
        machine.blocks[0].pages[3] = 0xFF
        sender.setup()
        assert sender.part() == (
            (b"\0\0\0\0\0\0\0\x08\3ram" + A_PAGE)  # PAGE
            + (b"\0\0\0\0\0\0\x10\x28" + A_PAGE)  # PAGE | CONTINUE
            + (b"\0\0\0\0\0\0\x20\x28" + A_PAGE)
            + (b"\0\0\0\0\0\0\x30\x28" + b"\xff" * PAGE)
            + b"\0\0\0\0\0\0\0\x10"
        )
        assert sender.end() == EOS


@pytest.mark.parametrize("touched", [False, True], ids=["never touched", "touched"])
def test_zero_pages_are_one_byte_each(sending: Sending, touched: bool) -> None:
    with StillMachine(block("ram", 3)) as machine, sending(machine) as sender:
        if touched:
            machine.blocks[0].pages[:] = 0
        sender.setup()
        assert sender.part() == (
            b"\0\0\0\0\0\0\0\x02" b"\3ram" b"\0"  # ZERO
            b"\0\0\0\0\0\0\x10\x22" b"\0"  # ZERO | CONTINUE
            b"\0\0\0\0\0\0\x20\x22" b"\0"
            b"\0\0\0\0\0\0\0\x10"
        )  # fmt: skip


@pytest.mark.parametrize("zeros", [slice(0, 2048), slice(0, None, 2), slice(700, 1400)])
def test_zero_pages_of_a_large_block_are_found(sending: Sending, zeros: slice) -> None:
    with StillMachine(block("ram", 4096)) as machine, sending(machine) as sender:
        machine.blocks[0].pages[:] = 1
        machine.blocks[0].pages[zeros] = 0
        sender.setup()
        records = page_records(sender.part())
        assert {record.page for record in records if record.kind is RamFlag.ZERO} == set(range(4096)[zeros])
        assert len(records) == 4096


def test_a_file_has_the_pages_in_the_order_of_their_addresses() -> None:
    """As QEMU sends them. volatility3 looks for a page by its address in the list of those that it read."""
    ram = block("ram", 600)
    with StillMachine(ram) as machine, Sender(machine, gathers=False) as sender:
        for page in range(0, 500, 3):
            ram.pages[page] = np.frombuffer(A_PAGE, dtype=np.uint8)
        ram.pages[[1, 2, 130, 131, 499]] = 0
        sender.setup()
        records = page_records(sender.part())
    assert [record.page for record in records] == list(range(600))
    assert {record.data for record in records} == {A_PAGE, b"\0"}
    assert [record.page for record in records if record.kind is RamFlag.PAGE] == list(range(0, 500, 3))


def test_each_block_is_named_where_it_begins(sending: Sending) -> None:
    one, two = block("one", 2), block("two", 2)
    with StillMachine(one, two) as machine, sending(machine) as sender:
        one.pages[:] = np.frombuffer(A_PAGE, dtype=np.uint8)
        sender.setup()
        assert sender.part() == (
            (b"\0\0\0\0\0\0\0\x08\3one" + A_PAGE)
            + (b"\0\0\0\0\0\0\x10\x28" + A_PAGE)
            + b"\0\0\0\0\0\0\0\x02\3two\0"
            + b"\0\0\0\0\0\0\x10\x22\0"
            + EOS
        )


def test_offsets_beyond_4_gib(sending: Sending) -> None:
    """2^21 pages and nothing in them but the last: each page costs 9 bytes on the wire and nothing here."""
    pages = (8 << 30) // PAGE
    with StillMachine(block("ram", pages)) as machine, sending(machine) as sender:
        machine.blocks[0].pages[pages - 1] = 1
        assert sender.setup() == b"\0\0\0\2\0\0\0\4" b"\3ram\0\0\0\2\0\0\0\0" + EOS  # fmt: skip
        body = sender.part()
        assert body.endswith(b"\0\0\0\1\xff\xff\xf0\x28" + b"\1" * PAGE + EOS)
        assert len(body) == 9 * (pages - 1) + 4 + 8 + PAGE + 8


def test_a_page_is_zero_only_when_all_of_it_is(sending: Sending) -> None:
    """One byte in each page, everywhere once."""
    with StillMachine(block("ram", PAGE)) as machine, sending(machine) as sender:
        positions = np.arange(PAGE)
        machine.blocks[0].pages[positions, positions] = 0x80
        sender.setup()
        records = page_records(sender.part())
        assert {record.kind for record in records} == {RamFlag.PAGE}
        assert sorted((record.page, record.data.index(0x80)) for record in records) == [(n, n) for n in range(PAGE)]


def test_full_and_zero_pages_in_turns_are_each_sent_once(sending: Sending) -> None:
    with StillMachine(block("ram", 1000), block("other", 500)) as machine, sending(machine) as sender:
        for number, one in enumerate(machine.blocks):
            full = np.random.default_rng(number).random(len(one.pages)) < 0.5
            one.pages[full] = noise(int(full.sum()))
            one.pages[400:420] = 0  # touched, zero
        sender.setup()
        records = page_records(sender.part())
        expected = [
            PageRecord(RamFlag.PAGE if page.any() else RamFlag.ZERO, one.idstr, n, bytes(page) if page.any() else b"\0")
            for one in machine.blocks
            for n, page in enumerate(one.pages)
        ]
        assert sorted(records) == sorted(expected)


# -- what is left alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logged", [False, True], ids=["parked", "with a guest"])
def test_what_was_never_touched_is_not_read(sending: Sending, logged: bool) -> None:
    with StillMachine(block("ram", 8192, logged=logged), block("none", 300, logged=logged)) as machine:
        sparse, none = machine.blocks
        sparse.pages[1000:1010] = noise(10)
        sparse.pages[8191] = 1
        before = allocated(sparse)
        with sending(machine) as sender:
            sender.setup()
            records = page_records(sender.part(), sender.end())
        assert (allocated(sparse), allocated(none)) == (before, 0)
        full = [record.page for record in records if record.kind is RamFlag.PAGE]
        zero = [(record.block, record.page) for record in records if record.kind is RamFlag.ZERO]
        assert sorted(full) == [*range(1000, 1010), 8191]
        holes = [("ram", page) for page in range(8192) if page not in full]
        assert sorted(zero) == sorted(holes + [("none", page) for page in range(300)])


def test_a_page_that_is_touched_in_the_course_of_it_is_sent_as_it_is(sending: Sending) -> None:
    with StillMachine(block("ram", 64, logged=True)) as machine, sending(machine) as sender:
        sender.setup()
        machine.blocks[0].pages[[3, 60]] = noise(2)
        assert len(page_records(sender.part())) == 64
        last = page_records(sender.end())
        assert [(record.kind, record.page) for record in last] == [(RamFlag.PAGE, 3), (RamFlag.PAGE, 60)]
        assert last[1].data == bytes(machine.blocks[0].pages[60])


def test_ram_is_not_changed_by_sending_it(sending: Sending) -> None:
    with StillMachine(block("ram", 100, logged=True)) as machine, sending(machine) as sender:
        machine.blocks[0].pages[10:90] = noise(80)
        before = machine.contents()
        sender.setup()
        sender.part()
        sender.end()
        assert machine.contents() == before


# -- budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 100_000, 3 * MIB])
def test_a_part_keeps_its_budget_but_for_one_page_and_gets_on(sending: Sending, budget: int) -> None:
    """A limit on the bandwidth may allow less than a batch in each hundredth of a second."""
    with StillMachine(block("ram", 2048)) as machine, sending(machine) as sender:
        machine.blocks[0].pages[:] = noise(2048)
        sender.setup()
        parts: list[bytes] = []
        while left := sender.estimate():
            parts.append(sender.part(budget))
            assert len(parts[-1]) <= budget + len(b"\3ram") + 8 + PAGE + len(EOS)
            assert sender.statistics.remaining_bytes < left
        assert [record.page for record in page_records(*parts)] == list(range(2048))


def test_a_part_of_holes_keeps_its_budget_too(sending: Sending) -> None:
    """2^20 pages would be 9 MiB of records."""
    pages = 1 << 20
    with StillMachine(block("ram", pages)) as machine, sending(machine) as sender:
        sender.setup()
        body = sender.part(2 * MIB)
        assert MIB < len(body) <= 2 * MIB + BATCH
        records, rest = divmod(len(body) - len(b"\3ram") - len(EOS), 9)
        assert rest == 0
        assert sender.estimate() == (pages - records) * PAGE


def test_a_part_says_whether_anything_is_left(sending: Sending) -> None:
    with StillMachine(block("ram", 1000)) as machine, sending(machine) as sender:
        machine.blocks[0].pages[:] = noise(1000)
        sender.setup()
        assert sender.part_is_last(budget=1) is False
        assert sender.part_is_last(budget=1 << 30) is True
        assert sender.part_is_last(budget=1 << 30) is True


# -- when the dirty log is asked -----------------------------------------------------------------------------------


def test_only_an_exact_answer_harvests(sending: Sending) -> None:
    ram = block("ram", 1000)
    ram.dirty_log = log = ToldLog()
    with StillMachine(ram) as machine, sending(machine) as sender:
        ram.pages[:] = noise(1000)
        sender.setup()
        assert log.calls == ["start"]
        assert sender.estimate() == 1000 * PAGE
        assert log.calls == ["start"]
        sender.part(300 * PAGE)
        left = sender.estimate()
        assert 0 < left < 1000 * PAGE
        log.tell(0, 7)
        assert sender.estimate() == left
        assert log.calls == ["start"]
        assert sender.harvest() == left + 7 * PAGE
        assert log.calls == ["start", "harvest"]
        sender.part()
        assert sender.harvest() == 0
        assert log.calls == ["start", "harvest", "harvest"]
        log.tell(999, 1000)
        assert [record.page for record in page_records(sender.end())] == [999]
        assert log.calls == ["start", "harvest", "harvest", "harvest"]
    assert log.calls[-1] == "stop"


def test_pages_that_are_dirty_twice_count_once(sending: Sending) -> None:
    ram = block("ram", 100)
    ram.dirty_log = log = ToldLog()
    with StillMachine(ram) as machine, sending(machine) as sender:
        sender.setup()
        sender.part()
        log.tell(10, 20)
        assert sender.harvest() == 10 * PAGE
        log.tell(5, 8)
        log.tell(15, 30)
        assert sender.harvest() == 23 * PAGE
        records = page_records(sender.part())
        assert sorted(record.page for record in records) == [5, 6, 7, *range(10, 30)]


# -- statistics ----------------------------------------------------------------------------------------------------


def test_the_counters(sending: Sending) -> None:
    ram, rom = block("ram", 100, logged=True), block("rom", 20)
    ram.pages[:30] = noise(30)
    ram.pages[30:40] = 0
    with StillMachine(ram, rom) as machine, sending(machine) as sender:
        counted = sender.statistics
        assert (counted.dirty_sync_count, counted.normal, counted.duplicate, counted.total_bytes) == (0, 0, 0, 0)
        sender.setup()
        assert (counted.page_size, counted.total_bytes, counted.remaining_bytes) == (PAGE, 120 * PAGE, 120 * PAGE)
        assert (counted.dirty_sync_count, counted.dirty_pages_rate) == (1, 0)
        sender.part()
        assert (counted.normal, counted.duplicate, counted.remaining_bytes) == (30, 90, 0)
        ram.pages[0] = 0
        ram.pages[50:52] = noise(2)
        assert sender.harvest() == counted.remaining_bytes == 3 * PAGE
        assert counted.dirty_sync_count == 2
        sender.part()
        assert (counted.normal, counted.duplicate, counted.remaining_bytes) == (32, 91, 0)
        ram.pages[99] = 1
        sender.end()
        assert (counted.normal, counted.duplicate, counted.dirty_sync_count) == (33, 91, 3)
        assert (counted.remaining_bytes, counted.postcopy_requests) == (0, 0)
    assert counted.total_bytes == 120 * PAGE


def test_remaining_bytes_go_down_with_every_part(sending: Sending) -> None:
    with StillMachine(block("ram", 1000)) as machine, sending(machine) as sender:
        machine.blocks[0].pages[:] = noise(1000)
        sender.setup()
        left = [sender.statistics.remaining_bytes]
        while left[-1]:
            sent = len(page_records(sender.part(200 * PAGE)))
            left.append(sender.statistics.remaining_bytes)
            assert left[-1] == left[-2] - sent * PAGE
        assert len(left) > 3
        assert all(before > after for before, after in itertools.pairwise(left))


def test_the_dirty_rate_is_pages_a_second_between_harvests(sending: Sending) -> None:
    """Bounds that hold however slow this host is: at least so long was waited."""
    ram = block("ram", 5000)
    ram.dirty_log = log = ToldLog()
    with StillMachine(ram) as machine, sending(machine) as sender:
        before = time.monotonic()
        sender.setup()
        after = time.monotonic()
        sender.part()
        time.sleep(0.15)
        log.tell(0, 1000)
        log.tell(2000, 4000)
        least = time.monotonic() - after
        sender.harvest()
        most = time.monotonic() - before
        assert int(3000 / most) <= sender.statistics.dirty_pages_rate <= 3000 / least
        time.sleep(0.15)
        sender.harvest()
        assert sender.statistics.dirty_pages_rate == 0


# -- the end -------------------------------------------------------------------------------------------------------


def test_cleanup_stops_every_log_wherever_it_was(sending: Sending) -> None:
    blocks = [block("ram", 10), block("rom", 10)]
    logs = [ToldLog(), ToldLog()]
    for one, log in zip(blocks, logs, strict=True):
        one.dirty_log = log
    with StillMachine(*blocks) as machine:
        with sending(machine) as sender:
            sender.setup()
            sender.part(1)
        assert [log.calls[-1] for log in logs] == ["stop", "stop"]
        for one in blocks:
            one.dirty_log = NeverDirty()
