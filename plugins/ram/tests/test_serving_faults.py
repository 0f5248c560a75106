"""Page faults of a process whose RAM is still arriving, served by compiled code and in Python: what has arrived is
installed, everything else is requested over the return path.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any, Final

import pytest
from corefw_ram.kernel import find_kernel

from corefw.engine.blocktime import Blocktime, MeasuredFaults
from corefw.engine.pagefaults import PageFaults
from corefw.engine.returnpath import ReturnPathWriter
from corefw.engine.standby import StandbyThread
from corefw.errors import ChannelError
from corefw.machine import FaultSource, GuestMapping, RamBlock
from corefw.memory.faults import NoFaults
from corefw.net.sockets import SocketChannel
from corefw.testing.tasks import wait_until
from corefw.wire.constants import ReturnMessage
from corefw.wire.returnpath import PageRequest, parse_number, parse_page_request, read_return_message
from corefw.wire.stream import MemorySource, StreamReader
from tests.helpers.ram import EOS, StillMachine, fill_record, page_record, receiving
from tests.helpers.watched import PAGE, PATIENCE, Guest

PAGES: Final = 64
HERE: Final = 40
"""The page that arrived before the guest began to run. The one behind it did so as well, and is zero."""


class InPython(MeasuredFaults):
    """Compiled code does not get to know where the guest's memory is."""

    def mapping(self, block: RamBlock) -> GuestMapping | None:
        return None


class Path:
    """A return path, and the source's end of it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.settimeout(PATIENCE)
        self._channels = SocketChannel(ours, "source"), SocketChannel(theirs, "destination")
        self.writer = ReturnPathWriter(self._channels[0], lambda: (0, ""))
        self._reader = StreamReader(self._channels[1])

    def next_message(self) -> Any:
        assert self._channels[1].wait_readable(PATIENCE) or self._reader.span()[0] < self._reader.span()[1], "silence"
        record = read_return_message(self._reader)
        return parse_number(record.body) if record.type is ReturnMessage.PONG else parse_page_request(record)

    def cut(self) -> None:
        self._channels[0].abort()

    def close(self) -> None:
        self.writer.close()
        for channel in self._channels:
            channel.close()


class Arrival:
    """A guest that touches some pages, and the engine that serves it. All pages but two are still to come."""

    def __init__(self, compiled: bool, touched: list[int]) -> None:
        self.guest = Guest(PAGES, lambda pages: [int(pages[page, 0]) for page in touched])
        self.blocktime = Blocktime()
        source: FaultSource = (MeasuredFaults if compiled else InPython)(self.guest.faults, self.blocktime)
        self._machine = StillMachine(self.guest.block)
        self._receiving = receiving(self._machine, MemorySource(b""))
        self.receiver = self._receiving.__enter__()
        self.guest.block.pages[HERE] = HERE
        self.receiver.loader.discard("ram", 0, HERE * PAGE)
        self.receiver.loader.discard("ram", (HERE + 2) * PAGE, (PAGES - HERE - 2) * PAGE)
        self.receiver.loader.listen(source)
        self.served = PageFaults(source, [self.receiver.loader], [self.guest.block])
        self.served.start(None, StandbyThread("page faults"))

    def bring(self, *pages: int, zero: bool = False) -> None:
        """Pages come over the channel of requested pages, each filled with its number, or with zeros."""
        data = b"".join(
            fill_record(page, 0, "ram") if zero else page_record(page, bytes([page]) * PAGE, "ram") for page in pages
        )
        self.receiver.loader.load_requested(StreamReader(MemorySource(data + EOS)))

    def close(self) -> None:
        self.served.close()
        self._receiving.__exit__(None, None, None)
        self.guest.close()


COMPILED: Final = pytest.param(
    True, id="compiled", marks=pytest.mark.skipif(find_kernel() is None, reason="needs plugins/ram_kernel")
)


@pytest.fixture(params=[COMPILED, pytest.param(False, id="python")])
def compiled(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path()
    yield path
    path.close()


def request_of(page: int) -> PageRequest:
    return PageRequest(page * PAGE, PAGE, "ram")


def test_missing_pages_are_requested_and_measured(compiled: bool, path: Path) -> None:
    arrival = Arrival(compiled, [7, 8, HERE, HERE + 1, 9])
    try:
        arrival.served.request_over(path.writer)
        arrival.guest.run()
        assert path.next_message() == request_of(7)
        path.writer.pong(5)
        assert path.next_message() == 5, "other messages go between the requests"
        arrival.bring(7)
        assert path.next_message() == request_of(8)
        arrival.bring(8)
        assert path.next_message() == request_of(9), "what has arrived is not requested"
        arrival.bring(9, zero=True)
        assert arrival.guest.result() == repr([7, 8, HERE, 0, 0])
        assert wait_until(lambda: arrival.blocktime.report().faults == 3)
        report = arrival.blocktime.report()
        assert (report.waiting, len(report.blocktime_of_threads)) == (0, 1)
    finally:
        arrival.close()


def test_a_page_is_requested_again_over_another_connection(compiled: bool, path: Path) -> None:
    arrival, other = Arrival(compiled, [7, 8]), Path()
    try:
        arrival.served.request_over(path.writer)
        arrival.guest.run()
        assert path.next_message() == request_of(7)
        arrival.served.request_over(None)
        path.cut()
        arrival.bring(7)
        assert wait_until(arrival.served.guest_waits), "for the next page, which was not requested"
        arrival.served.request_over(other.writer)
        assert other.next_message() == request_of(8)
        arrival.bring(8)
        assert arrival.guest.result() == "[7, 8]"
    finally:
        arrival.close()
        other.close()


def test_a_connection_that_breaks_without_notice_is_replaced(compiled: bool, path: Path) -> None:
    arrival, other = Arrival(compiled, [7, HERE]), Path()
    try:
        path.cut()
        arrival.served.request_over(path.writer)
        arrival.guest.run()
        assert wait_until(arrival.served.guest_waits)
        arrival.served.request_over(other.writer)
        assert other.next_message() == request_of(7)
        arrival.bring(7)
        assert arrival.guest.result() == repr([7, HERE])
    finally:
        arrival.close()
        other.close()


def test_a_guest_that_waits_for_ever_does_not_keep_the_engine(compiled: bool, path: Path) -> None:
    arrival = Arrival(compiled, [7])
    try:
        arrival.served.request_over(path.writer)
        arrival.guest.run()
        assert path.next_message() == request_of(7)
        arrival.served.release()
        assert arrival.guest.result() == "[0]"
    finally:
        arrival.close()


def test_a_process_without_descriptors_refuses_a_guest_that_it_could_not_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    source = NoFaults()
    try:
        monkeypatch.setattr(os, "eventfd", refuse)
        with pytest.raises(ChannelError, match="too many open files"):
            PageFaults(source, [], [])
    finally:
        source.close()
