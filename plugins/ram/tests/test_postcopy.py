"""Postcopy of the ram section: what is sent first, what is forgotten, and what must never be overwritten."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from corefw.errors import StreamError
from corefw.machine import FaultSource, RamBlock
from corefw.memory.runs import no_runs
from corefw.wire.constants import Command, RamFlag
from corefw.wire.frames import CommandItem, FrameReader
from corefw.wire.records import parse_discard
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.helpers.pages import pages_of
from tests.helpers.ram import (
    EOS,
    PAGE,
    Receiver,
    Sender,
    StillMachine,
    ToldLog,
    allocated,
    block,
    fill_record,
    header,
    name,
    noise,
    page_record,
    page_records,
    receiving,
)

PAGES = 256


class Installed(FaultSource):
    """A guest that waits for nothing; which pages were installed, in order."""

    def __init__(self) -> None:
        self.pages: list[int] = []

    def fileno(self) -> int:
        return -1

    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        return {}

    def install(self, block: RamBlock, runs: NDArray[np.int64]) -> None:
        self.pages += pages_of(runs)

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


# -- the source --------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[StillMachine]:
    ram, small = block("ram", PAGES), block("small", 8)
    ram.pages[:] = noise(PAGES)
    small.pages[:] = noise(8)
    ram.dirty_log = ToldLog()
    with StillMachine(ram, small) as machine:
        yield machine


@contextmanager
def stopped(machine: StillMachine) -> Iterator[Sender]:
    """A source that has handed the guest over, with everything still to be sent."""
    with Sender(machine) as sender:
        sender.setup()
        sender.saver.begin_postcopy(StreamWriter(MemorySink()))
        yield sender


class Parts:
    """The PARTs of one stream: a record that goes on with a block does not name it again."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._bodies: list[bytes] = []

    def next(self, pages: int) -> list[tuple[str, int]]:
        """What the next one brings, of about so many pages."""
        before = len(page_records(*self._bodies))
        self._bodies.append(self._sender.part(pages * PAGE))
        return [(record.block, record.page) for record in page_records(*self._bodies)[before:]]


def test_requested_pages_go_first_and_then_what_follows_them(machine: StillMachine) -> None:
    with stopped(machine) as sender:
        parts = Parts(sender)
        assert parts.next(1)[0] == ("ram", 0)
        sender.saver.request_pages("ram", 100 * PAGE, 2 * PAGE)
        sender.saver.request_pages("small", 3 * PAGE, PAGE)
        sender.saver.request_pages("ram", 50 * PAGE, PAGE)
        found = parts.next(3)
        assert found[:4] == [("ram", 100), ("ram", 101), ("small", 3), ("ram", 50)]
        assert found[4] == ("ram", 51)
        assert sender.statistics.postcopy_requests == 3


def test_every_page_goes_once_however_often_it_is_asked_for(machine: StillMachine) -> None:
    with stopped(machine) as sender:
        for _ in range(1000):
            sender.saver.request_pages("ram", 7 * PAGE, PAGE)
        parts = Parts(sender)
        found = parts.next(1)
        assert found.count(("ram", 7)) == 1
        sender.saver.request_pages("ram", 7 * PAGE, PAGE)
        while sender.saver.pending_estimate().total:
            found += parts.next(50)
        assert sorted(found) == [("ram", page) for page in range(PAGES)] + [("small", page) for page in range(8)]
        assert page_records(sender.end()) == []


@pytest.mark.parametrize(
    ("start", "length"), [(1, PAGE), (0, 0), (0, PAGE - 1), (PAGES * PAGE, PAGE), (PAGE, PAGES * PAGE), (1 << 63, PAGE)]
)
def test_a_request_for_anything_but_whole_pages_is_refused(machine: StillMachine, start: int, length: int) -> None:
    with stopped(machine) as sender, pytest.raises(StreamError, match="page request: expected whole pages"):
        sender.saver.request_pages("ram", start, length)


def test_a_request_for_another_block_is_refused(machine: StillMachine) -> None:
    with stopped(machine) as sender, pytest.raises(StreamError, match="one of the RAM blocks ram, small, got 'rom'"):
        sender.saver.request_pages("rom", 0, PAGE)


def discarded(write: Callable[[StreamWriter], None]) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    """The RAM_DISCARDs that this writes, and nothing else: blocks and ranges of (start, length)."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write(writer)
    writer.flush()
    frames = FrameReader.of_sections(StreamReader(MemorySource(bytes(sink.data) + b"\0")))
    found = []
    while isinstance(command := frames.next_event(), CommandItem):
        assert command.record.command is Command.POSTCOPY_RAM_DISCARD
        discard = parse_discard(command.record.payload)
        found.append((discard.block, discard.ranges))
    return found


def test_what_is_still_to_be_sent_is_discarded(machine: StillMachine) -> None:
    log = machine.blocks[0].dirty_log
    assert isinstance(log, ToldLog)
    with Sender(machine) as sender:
        sender.setup()
        sender.part()
        log.tell(4, 6)
        log.tell(9, 10)
        assert discarded(sender.saver.begin_postcopy) == [("ram", ((4 * PAGE, 2 * PAGE), (9 * PAGE, PAGE)))]
        assert sorted(Parts(sender).next(10)) == [("ram", 4), ("ram", 5), ("ram", 9)]


def test_what_is_dirty_before_the_guest_stops_is_discarded_before(machine: StillMachine) -> None:
    log = machine.blocks[0].dirty_log
    assert isinstance(log, ToldLog)
    with Sender(machine) as sender:
        sender.setup()
        sender.part()
        log.tell(4, 6)
        assert discarded(sender.saver.prepare_postcopy) == [("ram", ((4 * PAGE, 2 * PAGE),))]
        log.tell(9, 10)
        assert discarded(sender.saver.begin_postcopy) == [("ram", ((9 * PAGE, PAGE),))]
        assert sorted(Parts(sender).next(10)) == [("ram", 4), ("ram", 5), ("ram", 9)]


@pytest.mark.parametrize("requested", [False, True])
def test_what_is_written_into_a_hole_before_the_guest_stops_is_sent(requested: bool) -> None:
    """The block is still to be sent as a whole, so it is not looked through again while the guest stands still."""
    ram = block("ram", 64, logged=True)
    with StillMachine(ram) as machine, Sender(machine) as sender:
        sender.setup()
        sender.saver.prepare_postcopy(StreamWriter(MemorySink()))
        ram.pages[7] = 3
        sender.saver.begin_postcopy(StreamWriter(MemorySink()))
        if requested:
            sink = MemorySink()
            writer = StreamWriter(sink)
            sender.saver.send_requested(writer, "ram", 7 * PAGE, PAGE)
            writer.flush()
            assert bytes(sink.data) == page_record(7, bytes([3]) * PAGE, "ram")
        records = page_records(sender.part(64 * PAGE))
        sent = {record.page: record.data for record in records}
        assert sent.get(7) == (None if requested else bytes([3]) * PAGE)
        assert allocated(ram) == 1, "holes were not read"


HUGE = 16
"""Pages in one page of the guest's host, in these tests."""


def test_a_huge_page_of_the_host_goes_as_a_whole(machine: StillMachine) -> None:
    """A destination with such pages takes no other in between (QEMU, ram_load_postcopy)."""
    machine.blocks[0].host_page_size = HUGE * PAGE
    with stopped(machine) as sender:
        parts = Parts(sender)
        sender.saver.request_pages("ram", 100 * PAGE, PAGE)
        found = parts.next(1)
        assert found[0] == ("ram", 96)
        while sender.saver.pending_estimate().total:
            sender.saver.request_pages("ram", 200 * PAGE, PAGE)
            found += parts.next(5)
        pages = np.array([page for idstr, page in found if idstr == "ram"]).reshape(-1, HUGE)
        assert (pages == pages[:, :1] + np.arange(HUGE)).all()
        assert not (pages[:, 0] % HUGE).any()
        assert sorted(pages.ravel().tolist()) == list(range(PAGES))


def test_a_huge_page_of_the_host_is_discarded_as_a_whole(machine: StillMachine) -> None:
    ram = machine.blocks[0]
    ram.host_page_size = HUGE * PAGE
    assert isinstance(ram.dirty_log, ToldLog)
    with Sender(machine) as sender:
        sender.setup()
        sender.part()
        ram.dirty_log.tell(20, 21)
        assert discarded(sender.saver.prepare_postcopy) == [("ram", ((HUGE * PAGE, HUGE * PAGE),))]
        ram.dirty_log.tell(40, 41)
        assert discarded(sender.saver.begin_postcopy) == [("ram", ((2 * HUGE * PAGE, HUGE * PAGE),))]
        assert [page for _, page in Parts(sender).next(PAGES)] == list(range(HUGE, 3 * HUGE))


def test_after_a_break_what_has_not_arrived_is_sent_and_nothing_else(machine: StillMachine) -> None:
    with stopped(machine) as sender:
        Parts(sender).next(60)
        sender.saver.request_pages("ram", 200 * PAGE, PAGE)
        arrived = {"ram": np.ones(PAGES, dtype=np.bool_), "small": np.ones(8, dtype=np.bool_)}
        arrived["ram"][[3, 255]] = False
        sender.saver.prepare_resume(lambda idstr, pages: arrived[idstr][:pages])
        assert sorted(Parts(sender).next(PAGES)) == [("ram", 3), ("ram", 255)]


# -- the destination ---------------------------------------------------------------------------------------------------


@contextmanager
def listening(*discarded: int) -> Iterator[tuple[RamBlock, Receiver, Installed]]:
    """A destination that has all pages but these, and whose guest is about to run."""
    ram = block("ram", PAGES)
    with StillMachine(ram) as machine, receiving(machine, MemorySource(b"")) as receiver:
        ram.pages[:] = 1
        for page in discarded:
            receiver.loader.discard("ram", page * PAGE, PAGE)
        faults = Installed()
        receiver.loader.listen(faults)
        yield ram, receiver, faults


def load(receiver: Receiver, *pages: tuple[int, int]) -> None:
    """Load pages (number, fill), zero pages as such."""
    body = b""
    for page, fill in pages:
        flags = RamFlag.PAGE if fill else RamFlag.ZERO
        body += header(page, flags) + name("ram") + bytes([fill]) * (PAGE if fill else 1)
    receiver.reader = StreamReader(MemorySource(body + EOS), where="section 'ram'")
    receiver.load()


def test_what_arrives_is_installed() -> None:
    with listening(5, 6) as (ram, receiver, faults):
        load(receiver, (5, 2), (6, 3))
        assert faults.pages == [5, 6]
        assert ram.pages[5, 0] == 2 and ram.pages[6, 0] == 3
        assert receiver.loader.received("ram").all()


def test_a_page_that_is_here_is_never_overwritten() -> None:
    with listening(5, 7) as (ram, receiver, _):
        load(receiver, (5, 2))
        ram.pages[4:6] = 9  # the guest
        load(receiver, (4, 2), (5, 2), (5, 0), (7, 4))
        assert ram.pages[4, 0] == 9 and ram.pages[5, 0] == 9
        assert ram.pages[7, 0] == 4


def test_what_the_guest_waits_for_is_asked_for_until_it_arrives() -> None:
    with listening(5, 40, 41) as (_, receiver, faults):
        assert pages_of(receiver.loader.outstanding("ram")) == []
        assert receiver.loader.wait_for("ram", np.array([5, 40, 41, 100])).tolist() == [[5, 6], [40, 42]]
        assert 100 in faults.pages
        assert not {5, 40, 41} & set(faults.pages)
        load(receiver, (40, 2))
        assert receiver.loader.outstanding("ram").tolist() == [[5, 6], [41, 42]]


def test_a_zero_page_is_installed_when_the_guest_waits_for_it() -> None:
    with listening(5, 6, 7) as (_, receiver, faults):
        receiver.loader.wait_for("ram", np.array([6]))
        load(receiver, (5, 0), (6, 0))
        assert faults.pages == [6]
        assert receiver.loader.wait_for("ram", np.array([5])).tolist() == no_runs().tolist()
        assert 5 in faults.pages
        assert 7 not in faults.pages


@pytest.mark.parametrize(
    ("idstr", "start", "length"),
    [("rom", 0, PAGE), ("ram", 1, PAGE), ("ram", 0, 1), ("ram", PAGES * PAGE, PAGE), ("ram", 0, (PAGES + 1) * PAGE)],
)
def test_a_discard_of_anything_but_whole_pages_is_refused(idstr: str, start: int, length: int) -> None:
    with (
        StillMachine(block("ram", PAGES)) as machine,
        receiving(machine, MemorySource(b"")) as receiver,
        pytest.raises(StreamError, match="expected"),
    ):
        receiver.loader.discard(idstr, start, length)


def test_no_bitmap_of_a_block_that_is_not_there() -> None:
    with listening() as (_, receiver, _faults), pytest.raises(StreamError, match="got 'rom'"):
        receiver.loader.received("rom")


# -- requested pages over a channel of their own -----------------------------------------------------------------------


def load_requested(receiver: Receiver, data: bytes) -> None:
    receiver.loader.load_requested(StreamReader(MemorySource(data), where="requested pages"))


def test_pages_over_their_own_channel_are_installed() -> None:
    with listening(5, 6, 7) as (ram, receiver, faults):
        receiver.loader.wait_for("ram", np.array([6]))
        load_requested(
            receiver, page_record(5, b"a" * PAGE, "ram") + fill_record(6) + page_record(7, b"b" * PAGE) + EOS
        )
        assert faults.pages == [5, 6, 7]
        assert [ram.pages[page, 0] for page in (5, 6, 7)] == [ord("a"), 0, ord("b")]
        assert receiver.loader.received("ram").all()


def test_a_page_that_comes_over_both_channels_is_stored_once() -> None:
    with listening(5, 6) as (ram, receiver, faults):
        load_requested(receiver, page_record(5, b"a" * PAGE, "ram") + EOS)
        load(receiver, (5, 2), (6, 3))
        load_requested(receiver, page_record(6, b"a" * PAGE, "ram") + EOS)
        assert ram.pages[5, 0] == ord("a") and ram.pages[6, 0] == 3
        assert faults.pages == [5, 6]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (page_record(0, b"a" * PAGE), "expected a record that names its RAM block"),
        (fill_record(0, 0, "rom"), "expected one of the RAM blocks ram, got 'rom'"),
        (fill_record(PAGES, 0, "ram"), "expected an offset below 0x100000"),
        (header(PAGES, RamFlag.MEM_SIZE), "expected a page or a zero page"),
        (header(0, RamFlag.XBZRLE) + name("ram"), "expected a page or a zero page"),
        (b"\xff" * 8, "expected a RAM record"),
        (page_record(5, b"a" * PAGE, "ram")[:-1], "the end of the stream after 4095"),
        (page_record(5, b"a" * PAGE, "ram"), "the end of the stream after 0"),
    ],
)
def test_what_is_no_requested_page_is_refused(data: bytes, words: str) -> None:
    with listening(5) as (_, receiver, _faults), pytest.raises(StreamError, match=words):
        load_requested(receiver, data)


def test_every_page_goes_over_one_of_the_two_channels(machine: StillMachine) -> None:
    """Requested in one thread while another sends the rest; nothing is lost, nothing is sent twice."""
    with stopped(machine) as sender:
        requested = MemorySink()
        writer = StreamWriter(requested)

        def request() -> None:
            for page in [*range(0, PAGES, 3), *range(0, PAGES, 7)]:
                sender.saver.send_requested(writer, "ram", page * PAGE, PAGE)
            sender.saver.send_requested(writer, "small", 0, 8 * PAGE)
            sender.saver.end_requested(writer)
            writer.flush()

        thread = threading.Thread(target=request)
        thread.start()
        parts = Parts(sender)
        found: list[tuple[str, int]] = []
        while sender.saver.pending_estimate().total:
            found += parts.next(2)
        thread.join()
        found += [(record.block, record.page) for record in page_records(bytes(requested.data))]
        assert sorted(found) == [("ram", page) for page in range(PAGES)] + [("small", page) for page in range(8)]
        assert page_records(sender.end()) == []
        assert sender.statistics.normal == PAGES + 8


def test_the_stream_goes_on_where_it_was_when_a_page_is_sent_over_the_other_channel(machine: StillMachine) -> None:
    with stopped(machine) as sender:
        sender.saver.send_requested(StreamWriter(MemorySink()), "ram", 1 * PAGE, PAGE)
        assert Parts(sender).next(2)[:2] == [("ram", 0), ("ram", 2)]
