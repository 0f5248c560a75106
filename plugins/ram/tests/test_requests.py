"""Page requests that are answered while the rest is sent: by compiled code where there is such and the channels are
sockets, and by Python elsewhere, with the same result.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Final

import pytest

from corefw.net.sockets import SocketChannel
from corefw.wire.constants import RamFlag, ReturnMessage
from corefw.wire.records import RamLayout, read_ram_record
from corefw.wire.returnpath import (
    PageRequest,
    encode_return_message,
    number_body,
    page_request_message,
    parse_page_request,
    read_return_message,
)
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.helpers.ram import (
    EOS,
    PAGE,
    PageRecord,
    Sender,
    StillMachine,
    ToldLog,
    apply,
    block,
    noise,
    page_records,
)

PAGES: Final = 256
SMALL: Final = 8
ZERO: Final = 6
ASKED: Final = [
    *(("ram", page) for page in [*range(0, PAGES, 3), *range(0, PAGES, 7)]),
    *(("small", page) for page in range(SMALL)),
    ("ram", 1),
]
ALL: Final = [*(("ram", page) for page in range(PAGES)), *(("small", page) for page in range(SMALL))]


@pytest.fixture
def machine() -> Iterator[StillMachine]:
    ram, small = block("ram", PAGES), block("small", SMALL)
    ram.pages[:] = noise(PAGES)
    ram.pages[ZERO] = 0
    small.pages[:] = noise(SMALL)
    ram.dirty_log = ToldLog()
    with StillMachine(ram, small) as made:
        yield made


@pytest.fixture
def sender(machine: StillMachine) -> Iterator[Sender]:
    """A source that has handed the guest over, with everything still to be sent."""
    with Sender(machine) as made:
        made.setup()
        made.saver.begin_postcopy(StreamWriter(MemorySink()))
        yield made


class Line:
    """What is written to a channel, over a socket or without one."""

    def __init__(self, sink: MemorySink | SocketChannel, there: socket.socket | None, pool: ThreadPoolExecutor) -> None:
        self.writer = StreamWriter(sink)
        self._sink = sink
        self._data = pool.submit(lambda: b"".join(iter(lambda: there.recv(1 << 20), b""))) if there else None

    def received(self) -> bytes:
        """Everything; nothing is written afterwards."""
        self.writer.flush()
        if isinstance(self._sink, MemorySink):
            return bytes(self._sink.data)
        self._sink.send_eof()
        assert self._data is not None
        return self._data.result()


@contextmanager
def lines(*over_sockets: bool) -> Iterator[list[Line]]:
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        made = []
        for over_socket in over_sockets:
            if not over_socket:
                made.append(Line(MemorySink(), None, pool))
                continue
            here, there = socket.socketpair()
            stack.enter_context(there)
            made.append(Line(stack.enter_context(SocketChannel(here, "the destination")), there, pool))
        yield made


def answer(sender: Sender, path: SocketChannel, writer: StreamWriter) -> None:
    """Read the return path up to SHUT, as the engine does."""
    reader, name = StreamReader(path, size=4096), ""
    while (message := read_return_message(reader)).type is not ReturnMessage.SHUT:
        if message.type is ReturnMessage.PONG:
            continue
        request = parse_page_request(message)
        name = request.block or name
        sender.saver.send_requested(writer, name, request.start, request.length)
        writer.flush()
        name = sender.saver.serve_requests(reader, writer, name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("requested", [False, True])
def test_every_page_goes_out_once(machine: StillMachine, sender: Sender, stream: bool, requested: bool) -> None:
    """Whichever of the two channels is a socket; and what is counted is right."""
    here, there = socket.socketpair()
    with (
        lines(stream, requested) as (rest, answers),
        ThreadPoolExecutor(1) as pool,
        SocketChannel(here, "the destination") as path,
        there,
    ):
        sender.saver.iterate(rest.writer, 0)
        bodies = 1
        answered = pool.submit(answer, sender, path, answers.writer)
        for number, (name, page) in enumerate(ASKED):
            there.sendall(page_request_message(PageRequest(page * PAGE, PAGE, None if number % 2 else name)))
            if number % 16 == 0:
                there.sendall(encode_return_message(ReturnMessage.PONG, number_body(number)))
                sender.saver.iterate(rest.writer, 4 * PAGE)
                bodies += 1
        there.sendall(encode_return_message(ReturnMessage.SHUT, number_body(0)))
        answered.result()
        while sender.saver.pending_estimate().total:
            sender.saver.iterate(rest.writer, 50 * PAGE)
            bodies += 1
        sent = records(rest.received(), bodies) + page_records(answers.received() + EOS)
    assert sorted((one.block, one.page) for one in sent) == ALL
    contents = {one.idstr: bytearray(one.length) for one in machine.blocks}
    apply(sent, contents)
    assert contents == machine.contents()
    assert page_records(sender.end()) == []
    statistics = sender.statistics
    assert statistics.postcopy_requests == len(ASKED)
    assert (statistics.normal, statistics.duplicate, statistics.remaining_bytes) == (len(ALL) - 1, 1, 0)


def records(data: bytes, bodies: int) -> list[PageRecord]:
    """The page records of so many bodies of one section."""
    found: list[PageRecord] = []
    reader, name = StreamReader(MemorySource(data)), ""
    for _ in range(bodies):
        while (record := read_ram_record(reader, RamLayout())).kind is not RamFlag.EOS:
            name = record.idstr or name
            found.append(PageRecord(record.kind, name, record.address // PAGE, record.body))
    assert reader.at_end()
    return found
