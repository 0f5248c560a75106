"""The RAM section without an engine: a machine that is only RAM, both sides of the section driven by the test, and a
simple reader of records to compare with.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Final, NamedTuple, Self

import numpy as np
from corefw_ram.section import RamSectionLoader, RamSectionSaver
from numpy.typing import NDArray

from corefw.channel import Buffer, Interrupt, ReceivesFromSocket, ReceivesMemory, SendsMemory
from corefw.errors import MachineError
from corefw.machine import Device, DirtyLog, Machine, RamBlock, RamMakingMachine, RunState
from corefw.memory.blocks import MemfdBlock
from corefw.memory.hashes import HashLog
from corefw.memory.runs import runs_of_pages
from corefw.net import iovec
from corefw.section import Pending
from corefw.settings import Settings
from corefw.testing.recording import KitContext
from corefw.wire.constants import BE64, RAM_VERSION, RamFlag
from corefw.wire.records import RamLayout, read_ram_record
from corefw.wire.stream import MemorySink, MemorySource, Source, StreamReader, StreamWriter

PAGE: Final = 4096
ZERO_PAGE: Final = bytes(PAGE)
EOS: Final = BE64.pack(RamFlag.EOS)


def block(idstr: str, pages: int, *, logged: bool = False) -> MemfdBlock:
    """An empty RAM block. If `logged`, its dirty log finds writes through any mapping."""
    made = MemfdBlock(idstr, pages * PAGE)
    if logged:
        made.dirty_log = HashLog(made)
    return made


def allocated(ram: RamBlock) -> int:
    """Number of pages that the kernel has allocated."""
    return os.fstat(ram.fd).st_blocks * 512 // PAGE


def noise(pages: int, seed: int = 1) -> NDArray[np.uint8]:
    """Pages that are not zero."""
    made = np.frombuffer(np.random.default_rng(seed).bytes(pages * PAGE), dtype=np.uint8).reshape(pages, PAGE).copy()
    made[:, 0] |= 1
    return made


class ToldLog(DirtyLog):
    """A dirty log to which a test reports writes; `calls` in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._told: set[int] = set()

    def tell(self, first: int, end: int) -> None:
        self._told.update(range(first, end))

    def start(self) -> None:
        self.calls.append("start")
        self._told.clear()

    def harvest(self) -> NDArray[np.int64]:
        self.calls.append("harvest")
        found, self._told = sorted(self._told), set()
        return runs_of_pages(np.array(found, dtype=np.int64))

    def stop(self) -> None:
        self.calls.append("stop")


class StillMachine(Machine):
    """A machine of RAM blocks; the test writes to them as the guest would."""

    kind = "still"
    name = "still"
    run_state = RunState.PRELAUNCH

    def __init__(self, *blocks: MemfdBlock) -> None:
        self.blocks = list(blocks)

    def ram_blocks(self) -> Sequence[MemfdBlock]:
        return self.blocks

    def contents(self) -> dict[str, bytes]:
        return {one.idstr: bytes(one.view) for one in self.blocks}

    def devices(self) -> Sequence[Device]:
        return ()

    def start(self) -> None:
        raise MachineError("this guest does not run")

    def stop(self, state: RunState) -> None:
        pass

    def set_run_state(self, state: RunState) -> None:
        pass

    def watch(self, observer: Callable[[RunState, RunState], None]) -> None:
        pass

    def information(self) -> Mapping[str, object]:
        return {"ram": {one.idstr: one.length for one in self.blocks}}

    def close(self) -> None:
        for one in self.blocks:
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MakingMachine(StillMachine, RamMakingMachine):
    """Accepts whatever RAM the stream has, up to `limit` bytes (RamMakingMachine)."""

    def __init__(self, limit: int = 1 << 30) -> None:
        super().__init__()
        self._limit = limit

    def make_ram_blocks(self, lengths: Mapping[str, int]) -> Sequence[RamBlock]:
        for idstr, length in lengths.items():
            if length <= 0 or length % PAGE or not idstr.isprintable():
                raise MachineError(f"'{idstr}' with {length} bytes is no RAM block here")
        if sum(lengths.values()) + sum(one.length for one in self.blocks) > self._limit:
            raise MachineError(f"{sum(lengths.values())} bytes are more than the {self._limit} allowed")
        made = [MemfdBlock(idstr, length) for idstr, length in lengths.items()]
        self.blocks += made
        return made

    def discard_loaded(self) -> None:
        self.close()
        self.blocks.clear()


# -- the source's half ---------------------------------------------------------------------------------------------


class Sender:
    """The RAM section of a source. Each step returns the body that it wrote.

    on_send   called while a part is being sent, before the bytes are read
    gathers   the channel sends directly from guest memory, as a socket does (SendsMemory)
    """

    def __init__(self, machine: Machine, on_send: Callable[[], object] | None = None, *, gathers: bool = False) -> None:
        self.saver = RamSectionSaver(machine)
        self.statistics = self.saver.ram_statistics()
        self._on_send = on_send
        self._sink = _GatheringSink if gathers else _Sink
        self._interrupt = Interrupt()
        self._context = KitContext(Settings(), self._interrupt)

    def setup(self) -> bytes:
        return self._written(lambda writer: self.saver.setup(writer, self._context))

    def part(self, budget: int = 1 << 40) -> bytes:
        return self._written(lambda writer: self.saver.iterate(writer, budget))

    def part_is_last(self, budget: int) -> bool:
        """The result of iterate(); discards the body."""
        return self.saver.iterate(StreamWriter(self._sink(None)), budget)

    def end(self) -> bytes:
        return self._written(self.saver.complete)

    def estimate(self) -> int:
        """Bytes left, without a harvest."""
        return _all_precopy(self.saver.pending_estimate())

    def harvest(self) -> int:
        """Bytes left, after a harvest."""
        return _all_precopy(self.saver.pending_exact())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.saver.cleanup()
        self._interrupt.close()

    def _written(self, write: Callable[[StreamWriter], object]) -> bytes:
        sink = self._sink(self._on_send)
        writer = StreamWriter(sink)
        write(writer)
        writer.flush()
        assert writer.position == len(sink.data), "what is paced by the position would be wrong"
        return bytes(sink.data)


def _all_precopy(left: Pending) -> int:
    assert left.can_postcopy == 0
    return left.must_precopy


class _Sink(MemorySink):
    def __init__(self, on_send: Callable[[], object] | None) -> None:
        super().__init__()
        self._on_send = on_send

    def send(self, *parts: Buffer) -> None:
        if self._on_send is not None:
            self._on_send()
        super().send(*parts)


class _GatheringSink(_Sink, SendsMemory):
    def send_memory(self, pieces: NDArray[np.uint64]) -> None:
        if self._on_send is not None:
            self._on_send()
        assert pieces.flags.c_contiguous, "the kernel's struct iovec as it is"
        for address, count in pieces.tolist():
            self.data += ctypes.string_at(address, count)


# -- the destination's half ----------------------------------------------------------------------------------------


class Portions:
    """A Source that returns its bytes in portions of these sizes, cyclically."""

    def __init__(self, data: bytes, sizes: Sequence[int]) -> None:
        self._source = MemorySource(data)
        self._sizes = sizes
        self._turn = 0

    def receive_into(self, view: memoryview, /) -> int:
        size = self._sizes[self._turn % len(self._sizes)]
        self._turn += 1
        return self._source.receive_into(view[:size])

    def close(self) -> None:
        """Do nothing."""


class MemoryPortions(Portions, ReceivesMemory):
    """Portions for a channel that receives into guest memory, as a socket does."""

    def receive_memory(self, pieces: NDArray[np.uint64]) -> int:
        assert pieces.flags.c_contiguous, "the kernel's struct iovec as it is"
        assert len(pieces), "asked for nothing"
        portion = bytearray(max(self._sizes))
        count = at = self.receive_into(memoryview(portion)[: int(pieces[:, 1].sum())])
        for address, room in pieces.tolist():
            part = bytes(portion[count - at : count - at + min(at, room)])
            ctypes.memmove(address, part, len(part))
            at -= len(part)
        return count


class SocketPortions(ReceivesMemory, ReceivesFromSocket):
    """Portions over a real socket, from which compiled code can receive if it is installed. Receives do not wait: each
    gets the rest of a portion."""

    def __init__(self, data: bytes, sizes: Sequence[int]) -> None:
        self._portions = MemoryPortions(data, sizes)
        self._room = memoryview(bytearray(max(sizes)))
        self._waiting = self._room[:0]
        self._unread = 0
        self._ended = False
        self._out, self._into = socket.socketpair()
        self._into.setblocking(False)

    def receive_into(self, view: memoryview, /) -> int:
        return self.receive_from_socket(lambda _: self._into.recv_into(view))

    def receive_memory(self, pieces: NDArray[np.uint64]) -> int:
        return self.receive_from_socket(lambda descriptor: iovec.receive_some(descriptor, pieces))

    def receive_from_socket(self, receive: Callable[[int], int]) -> int:
        if self._ended:
            return 0
        if not self._unread:
            self._send()
        count = receive(self._into.fileno())
        self._unread -= count
        self._ended = not count
        return count

    def _send(self) -> None:
        if not self._waiting:
            self._waiting = self._room[: self._portions.receive_into(self._room)]
        if not self._waiting:
            self._out.shutdown(socket.SHUT_WR)
            return
        self._unread = self._out.send(self._waiting, socket.MSG_DONTWAIT)
        self._waiting = self._waiting[self._unread :]

    def close(self) -> None:
        self._out.close()
        self._into.close()


class Receiver:
    """The RAM section of a destination, with one reader for all bodies."""

    def __init__(self, machine: Machine, source: Source, *, buffer: int = 1 << 20) -> None:
        self.loader = RamSectionLoader(machine)
        self.reader = StreamReader(source, size=buffer, where="section 'ram'")

    def load(self, bodies: int = 1) -> None:
        for _ in range(bodies):
            self.loader.load(self.reader, RAM_VERSION)


@contextmanager
def receiving(machine: Machine, source: Source, *, buffer: int = 1 << 20) -> Iterator[Receiver]:
    receiver = Receiver(machine, source, buffer=buffer)
    with closing(Interrupt()) as interrupt:
        receiver.loader.setup(KitContext(Settings(), interrupt))
        try:
            yield receiver
        finally:
            receiver.loader.cleanup()


def load(machine: Machine, *bodies: bytes, sizes: Sequence[int] = (1 << 20,), buffer: int = 1 << 20) -> None:
    """Load the bodies, received in portions of these sizes. Raises what the loader raises."""
    with receiving(machine, Portions(b"".join(bodies), sizes), buffer=buffer) as receiver:
        receiver.load(len(bodies))


# -- records, one by one ---------------------------------------------------------------------------------------------


class PageRecord(NamedTuple):
    """A record of one page. `kind` is PAGE or ZERO, `page` a number, `data` the page or its fill byte."""

    kind: RamFlag
    block: str
    page: int
    data: bytes


def page_records(*bodies: bytes) -> list[PageRecord]:
    """The page records in these bodies of one section. Each must end with its EOS."""
    found: list[PageRecord] = []
    name = ""
    for body in bodies:
        reader = StreamReader(MemorySource(body))
        while True:
            record = read_ram_record(reader, RamLayout())
            if record.kind in (RamFlag.PAGE, RamFlag.ZERO):
                name = record.idstr or name
                found.append(PageRecord(record.kind, name, record.address // PAGE, record.body))
            elif record.kind is RamFlag.EOS:
                break
        assert reader.at_end(), f"{len(body) - reader.offset} bytes behind the EOS"
    return found


def apply(records: Iterable[PageRecord], contents: dict[str, bytearray]) -> None:
    """Apply the records, in the simplest possible way."""
    for record in records:
        data = record.data if record.kind is RamFlag.PAGE else record.data * PAGE
        contents[record.block][record.page * PAGE : (record.page + 1) * PAGE] = data


# -- writing records by hand ---------------------------------------------------------------------------------------


def header(page: int, flags: int) -> bytes:
    return BE64.pack(page * PAGE | flags)


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def block_list(**lengths: int) -> bytes:
    """A MEM_SIZE record; lengths in pages."""
    entries = [name(idstr) + BE64.pack(pages * PAGE) for idstr, pages in lengths.items()]
    return header(sum(lengths.values()), RamFlag.MEM_SIZE) + b"".join(entries)


def page_record(page: int, data: bytes, idstr: str | None = None) -> bytes:
    return _begun(page, RamFlag.PAGE, idstr) + data


def fill_record(page: int, value: int = 0, idstr: str | None = None) -> bytes:
    return _begun(page, RamFlag.ZERO, idstr) + bytes([value])


def _begun(page: int, kind: RamFlag, idstr: str | None) -> bytes:
    return header(page, kind | RamFlag.CONTINUE) if idstr is None else header(page, kind) + name(idstr)
