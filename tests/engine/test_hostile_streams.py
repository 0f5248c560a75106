"""Streams that are cut or changed load, or fail with the offset; no other exception, and memory stays bounded.

The loader is called without a transport, so that every byte of a stream can be tried.
"""

from __future__ import annotations

import gzip
import re
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.channel import Buffer, Channel, Interrupt, Listener
from corefw.dispatch import EventDispatcher
from corefw.engine.arrival import load_guest, set_up
from corefw.engine.destination import Destination
from corefw.engine.guestlock import GuestLock
from corefw.engine.tails import tail_of
from corefw.errors import Interrupted, MigfwError, RemoteStreamError
from corefw.machine import Machine, MachineConfig
from corefw.plugins import Plugins
from corefw.uri import MigrationUri
from tests.helpers.engines import Pair, ended
from tests.helpers.machines import CountingMachine

GOLDEN = Path(__file__).parent.parent / "golden"
FLIPS = (0x01, 0x80, 0xFF)
MEMORY = 24 << 20
"""Bytes that a load may allocate, whatever a stream announces (without the RAM itself, which is in memfds)."""


class Bytes(Channel):
    """A channel that has all of its bytes, and discards what is sent."""

    peer = "bytes"
    has_return_path = True

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def send(self, *parts: Buffer) -> None:
        pass

    def receive_into(self, view: memoryview) -> int:
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def wait_readable(self, seconds: float) -> bool:
        return True

    def send_eof(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class OneChannel(Listener):
    """A listener that returns one channel; nothing else ever connects."""

    uri = MigrationUri("bytes", "")

    def __init__(self, channel: Channel) -> None:
        self._channels = [channel]

    def accept(self, interrupt: Interrupt) -> Channel:
        if self._channels:
            return self._channels.pop()
        interrupt.wait(None)
        raise Interrupted("cancelled")

    def close(self) -> None:
        pass


def load(plugins: Plugins, machine: Machine, data: bytes) -> None:
    """Run the phases of a destination in this thread."""
    settings = plugins.settings()
    loaders = tail_of(machine).loaders(plugins.section_loaders(machine, settings))
    listener = OneChannel(Bytes(data))
    guest_lock = GuestLock(EventDispatcher())
    destination = Destination(machine, settings, loaders, listener, guest_lock, lambda: False, relisten=None)
    try:
        set_up(destination)
        load_guest(destination)
    finally:
        destination.clean_loaders_up()
        destination.stop_listening()
        destination.close()
        destination.interrupt.close()


@contextmanager
def memory_counted() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def outcome(plugins: Plugins, machine: Machine, data: bytes) -> MigfwError | None:
    """The error of a load, or None if it succeeded. Exceptions other than MigfwError fail the test."""
    with closing(machine):
        try:
            load(plugins, machine, data)
        except MigfwError as error:
            return error
    return None


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small guest: one page with data, one of zeros, two devices, every optional part of the frame."""
    plugins = Plugins.load()
    path = tmp_path_factory.mktemp("stream") / "guest"
    with Pair(plugins) as pair:
        source = pair.source(small(incoming=False), running=False)
        source.set_capabilities({"return-path": False})
        source.migrate(f"file:{path}")
        assert ended(source) == "completed"
    return path.read_bytes()


def small(*, incoming: bool = True) -> CountingMachine:
    machine = CountingMachine(2, incoming=incoming, instances=2)
    if not incoming:
        machine.block.pages[0, :] = 7
    return machine


def with_return_path(stream: bytes) -> bytes:
    """The same stream, with the commands that open the return path after the configuration."""
    at = stream.index(b"\x01\x00\x00\x00\x00\x03ram")
    return stream[:at] + b"\x08\x00\x01\x00\x00" + b"\x08\x00\x02\x00\x04\x00\x00\x00\x01" + stream[at:]


def test_the_streams_themselves_load(plugins: Plugins, stream: bytes) -> None:
    assert outcome(plugins, small(), stream) is None
    assert outcome(plugins, small(), with_return_path(stream)) is None


def test_cut_anywhere(plugins: Plugins, stream: bytes) -> None:
    """Two cuts look like a source that sends no description: right after EOF, and at the end of the stream."""
    stream = with_return_path(stream)
    ends = {len(stream), stream.index(b'{"page_size"') - 5}
    page = range(stream.index(bytes([7]) * 4096), stream.index(bytes([7]) * 4096) + 4000)
    for length in range(len(stream)):
        if length in page and length % 256:
            continue  # inside a page one cut is like another
        error = outcome(plugins, small(), stream[:length])
        if length in ends:
            assert error is None
            continue
        assert isinstance(error, RemoteStreamError), f"cut at {length}: {error!r}"
        assert error.offset <= length and re.search(r"at offset \d+ of the stream", str(error))


def test_any_byte_changed(plugins: Plugins, stream: bytes) -> None:
    loads = 0
    for at, damaged in changed(with_return_path(stream), FLIPS):
        error = outcome(plugins, small(), damaged)
        assert error is None or isinstance(error, RemoteStreamError), f"byte {at}: {error!r}"
        loads += error is None
    assert loads, "content that no check can know loads"


def test_memory_is_bounded_whatever_is_announced(plugins: Plugins, stream: bytes) -> None:
    with memory_counted():
        for at, damaged in changed(with_return_path(stream), (0xFF,)):
            machine = small()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            outcome(plugins, machine, damaged)
            assert tracemalloc.get_traced_memory()[1] - before < MEMORY, f"byte {at}"


def changed(stream: bytes, flips: tuple[int, ...]) -> Iterator[tuple[int, bytes]]:
    """The stream with one byte changed, for each byte up to the description's text but those inside a page."""
    page = stream.index(bytes([7]) * 4096)
    for at in range(stream.index(b'{"page_size"') + 8):
        if page + 8 <= at < page + 4090:
            continue
        for flip in flips:
            yield at, stream[:at] + bytes([stream[at] ^ flip]) + stream[at + 1 :]


@given(prefix=st.integers(0, 200), tail=st.binary(max_size=400))
@settings(max_examples=150)
def test_arbitrary_bytes_behind_any_beginning(plugins: Plugins, stream: bytes, prefix: int, tail: bytes) -> None:
    error = outcome(plugins, small(), with_return_path(stream)[:prefix] + tail)
    assert isinstance(error, RemoteStreamError)


COUNTING = b"QEVM\0\0\0\3\x07\0\0\0\x08counting"


def subsection(name: str, body: bytes) -> bytes:
    """A subsection of the configuration."""
    full = f"configuration/{name}".encode()
    return b"\5" + bytes([len(full)]) + full + b"\0\0\0\1" + body


HOSTILE: list[tuple[str, bytes, str]] = [
    ("empty", b"", "the end of the stream"),
    ("obsolete", b"QEVM\0\0\0\2", "obsolete"),
    ("later version", b"QEVM\0\0\0\4", "version 4"),
    ("endless name", b"QEVM\0\0\0\3\x07\xff\xff\xff\xff" + bytes(100), "at most"),
    ("no configuration", b"QEVM\0\0\0\3\1", "a configuration section"),
    ("unknown section type", b"QEVM\0\0\0\3\x07\0\0\0\x08counting\x55", "the type byte 0x55"),
    ("description first", b"QEVM\0\0\0\3\x07\0\0\0\x08counting\x06\xff\xff\xff\xff", "the type byte 0x06"),
    ("postcopy", b"QEVM\0\0\0\3\x07\0\0\0\x08counting\x08\0\3\0\1\0", "POSTCOPY_ADVISE"),
    ("unknown command", b"QEVM\0\0\0\3\x07\0\0\0\x08counting\x08\0\x63\0\0", "command 99"),
    ("part of nothing", b"QEVM\0\0\0\3\x07\0\0\0\x08counting\x02\0\0\0\5", "the id of a section that was started"),
    ("nothing at all", b"QEVM\0\0\0\3\x07\0\0\0\x08counting\0", "the end of the stream"),
    ("large pages", COUNTING + subsection("target-page-bits", b"\0\0\0\x0e") + b"\0", "target pages of 4096 bytes"),
    ("pages elsewhere", COUNTING + subsection("capabilities", b"\0\0\0\1\x0fx-ignore-shared"), "'x-ignore-shared'"),
    ("escapes in a machine's name", b"QEVM\0\0\0\3\x07\0\0\0\5\x1b[31m", r"got '\x1b[31m'"),
    ("escapes in a section's name", COUNTING + b"\4\0\0\0\0\5\x1b[31m\0\0\0\0\0\0\0\1", r"got '\x1b[31m'"),
    ("lines in a subsection's name", COUNTING + b"\5\3a\nb\0\0\0\0", r"got 'a\nb'"),
]


@pytest.mark.parametrize(("data", "told"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_beginnings(plugins: Plugins, data: bytes, told: str) -> None:
    error = outcome(plugins, small(), data)
    assert isinstance(error, RemoteStreamError) and told in str(error), error
    assert str(error).isprintable()


def ram(word: int, body: bytes = b"", name: bytes = b"") -> bytes:
    return word.to_bytes(8, "big") + (bytes([len(name)]) + name if name else b"") + body


FIRST_PAGE = ram(8, bytes(4096), b"counters")
BELOW = "an offset below 0x2000"

RAM_RECORDS: list[tuple[str, bytes, str]] = [
    ("beyond the block", ram(0x2000 | 8, bytes(4096), b"counters"), BELOW),
    ("run beyond the block", FIRST_PAGE + b"".join(ram(n << 12 | 0x28, bytes(4096)) for n in range(1, 9)), BELOW),
    ("negative run", FIRST_PAGE + ram(0xFFFF_FFFF_FFFF_F022, b"\0") * 9, BELOW),
    ("unknown block", ram(8, bytes(4096), b"other"), "block 'other'"),
    ("no block yet", ram(0x28, bytes(4096)), "a record that names its RAM block"),
    ("XBZRLE", ram(0x40), "XBZRLE"),
    ("compressed", ram(0x100), "compressed"),
    ("RDMA", ram(0x80), "RDMA"),
    ("obsolete", ram(0x01), "obsolete"),
    ("flags that exclude each other", ram(0x0A), "flags 0xa"),
]


@pytest.mark.parametrize(("record", "told"), [row[1:] for row in RAM_RECORDS], ids=[row[0] for row in RAM_RECORDS])
def test_hostile_ram_records(plugins: Plugins, stream: bytes, record: bytes, told: str) -> None:
    start = stream.index(b"\x02\x00\x00\x00\x00")  # the first PART
    error = outcome(plugins, small(), stream[: start + 5] + record + bytes(1 << 16))
    assert isinstance(error, RemoteStreamError) and told in str(error), error


# -- a parked machine keeps unknown sections, and is as careful --------------------------------------------------------


def parked(plugins: Plugins) -> Machine:
    return plugins.machine("qemu", MachineConfig(incoming=True))


@pytest.fixture(scope="module")
def recorded() -> bytes:
    return gzip.decompress((GOLDEN / "microvm.gz").read_bytes())


def damages(data: bytes, count: int) -> Iterator[int]:
    """Offsets all over the stream, most of them in the devices."""
    devices = data.rindex(b"\x03\x00\x00\x00") if b"\x03\x00\x00\x00" in data else 0
    yield from range(0, devices, max(1, devices // count))
    yield from range(devices, len(data), max(1, (len(data) - devices) // count))


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_parked_machine(plugins: Plugins, recorded: bytes, damage: str) -> None:
    change: Callable[[int], bytes] = {
        "cut": lambda at: recorded[:at],
        "changed": lambda at: recorded[:at] + bytes([recorded[at] ^ 0x41]) + recorded[at + 1 :],
    }[damage]
    assert outcome(plugins, parked(plugins), recorded) is None
    for at in damages(recorded, 60):
        error = outcome(plugins, parked(plugins), change(at))
        assert error is None or isinstance(error, MigfwError)
        if damage == "cut":
            assert isinstance(error, RemoteStreamError), f"cut at {at} of {len(recorded)}: {error!r}"
