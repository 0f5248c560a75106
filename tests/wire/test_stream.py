"""The reader returns what was written, however it was cut; a cut or wrong stream is an error with its place."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.channel import Buffer, ReceivesMemory
from corefw.errors import RemoteStreamError, StreamError
from corefw.wire.stream import BUFFER_SIZE, MemorySink, MemorySource, StreamReader, StreamWriter

Item = tuple[str, int | str | bytes]


class Chunks:
    """A source that returns its data in the given pieces, and counts what it returned."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data = memoryview(data)
        self.sizes = sizes
        self.turn = 0
        self.given = 0

    def receive_into(self, view: memoryview, /) -> int:
        assert len(view) > 0, "asked for nothing"
        n = min(len(view), self.sizes[self.turn % len(self.sizes)], len(self.data) - self.given)
        self.turn += 1
        view[:n] = self.data[self.given : self.given + n]
        self.given += n
        return n


class Parts:
    """A sink that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, ...]] = []

    def send(self, *parts: Buffer) -> None:
        self.calls.append(tuple(bytes(part) for part in parts))


def write(writer: StreamWriter, item: Item) -> None:
    kind, value = item
    match kind, value:
        case "u8", int():
            writer.u8(value)
        case "be16", int():
            writer.be16(value)
        case "be32", int():
            writer.be32(value)
        case "be64", int():
            writer.be64(value)
        case "string", str():
            writer.string(value)
        case (("read" | "read_into"), bytes()):
            writer.write(value)
        case _, bytes():
            writer.payload(value)


def read(reader: StreamReader, item: Item) -> int | str | bytes:
    """The value at this place, read as `item`'s kind, as long as `item` is."""
    kind, value = item
    match kind:
        case "u8":
            return reader.u8("it")
        case "be16":
            return reader.be16("it")
        case "be32":
            return reader.be32("it")
        case "be64":
            return reader.be64("it")
        case "string":
            return reader.string("it")
    assert isinstance(value, bytes)
    if kind == "read":
        return reader.read(len(value), "it")
    into = bytearray(len(value))
    reader.read_into(memoryview(into), "it")
    return bytes(into)


def encode(items: list[Item]) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    for item in items:
        write(writer, item)
    position = writer.position
    writer.flush()
    assert writer.position == position == len(sink.data)
    return bytes(sink.data)


ITEMS = st.one_of(
    st.tuples(st.just("u8"), st.integers(0, 2**8 - 1)),
    st.tuples(st.just("be16"), st.integers(0, 2**16 - 1)),
    st.tuples(st.just("be32"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("be64"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("string"), st.text(max_size=60)),
    st.tuples(st.sampled_from(["read", "read_into", "payload"]), st.binary(max_size=200)),
)
LISTS = st.lists(ITEMS, max_size=20)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(items=LISTS, sizes=SIZES, buffer=st.integers(8, 64))
def test_however_the_stream_is_cut_the_same_comes_out(items: list[Item], sizes: list[int], buffer: int) -> None:
    data = encode(items)
    reader = StreamReader(Chunks(data, sizes), size=buffer)
    for item in items:
        assert read(reader, item) == item[1]
    assert reader.offset == len(data)
    assert reader.at_end()
    assert reader.peek(1) == b""


@given(items=LISTS.filter(lambda items: bool(encode(items))), sizes=SIZES, choice=st.integers(0))
def test_a_stream_that_ends_early_is_an_error_with_its_place(items: list[Item], sizes: list[int], choice: int) -> None:
    data = encode(items)
    cut = choice % len(data)
    reader = StreamReader(Chunks(data[:cut], sizes), size=32, where="section 'x'")
    starts = 0
    with pytest.raises(RemoteStreamError) as caught:
        for item in items:
            starts = reader.offset
            read(reader, item)
    error = caught.value
    assert starts <= error.offset <= cut
    assert error.where == "section 'x'"
    assert "the end of the stream after" in error.got
    assert f"(at offset {error.offset} of the stream)" in str(error)
    assert "\n" not in str(error)


EVERY_KIND: list[Item] = [
    ("u8", 1),
    ("be16", 2),
    ("be32", 3),
    ("be64", 4),
    ("string", "name"),
    ("read", b"12345"),
    ("read_into", b"67890" * 20),
]


@pytest.mark.parametrize("cut", range(len(encode(EVERY_KIND))))
def test_every_byte_at_which_it_may_end(cut: int) -> None:
    reader = StreamReader(MemorySource(encode(EVERY_KIND)[:cut]), size=64)
    with pytest.raises(RemoteStreamError) as caught:
        for item in EVERY_KIND:
            read(reader, item)
    assert caught.value.offset <= cut


def test_golden_bytes() -> None:
    items: list[Item] = [("u8", 7), ("be16", 0x102), ("be32", 0x1020304), ("be64", 0x102030405060708), ("string", "é")]
    assert encode(items).hex(" ") == "07 01 02 01 02 03 04 01 02 03 04 05 06 07 08 02 c3 a9"


def test_a_length_is_capped_before_anything_is_received() -> None:
    source = Chunks(b"x" * 100, [100])
    reader = StreamReader(source, size=16)
    with pytest.raises(RemoteStreamError) as caught:
        reader.read(1 << 60, "the description", limit=16 << 20)
    assert source.given == 0
    assert caught.value.expected == "at most 16777216 bytes of the description"
    assert caught.value.got == f"a length of {1 << 60}"


def test_memory_grows_with_what_arrives_not_with_what_was_announced() -> None:
    reader = StreamReader(MemorySource(b"x" * 100), size=16)
    with pytest.raises(RemoteStreamError) as caught:
        reader.read(1 << 60, "a lie")
    assert caught.value.offset == 96  # the last whole buffer before the end
    assert reader.read(4, "the rest") == b"xxxx"


def test_a_name_that_is_no_text() -> None:
    reader = StreamReader(MemorySource(b"\x00\x02\xff\xfe"), where="section header")
    reader.u8("type")
    with pytest.raises(RemoteStreamError) as caught:
        reader.string("the name")
    assert (
        str(caught.value) == r"section header: expected the name as text, got b'\xff\xfe' (at offset 1 of the stream)"
    )


def test_a_name_that_is_too_long_is_not_written() -> None:
    sink = MemorySink()
    writer = StreamWriter(sink)
    writer.string("é" * 127)
    with pytest.raises(StreamError, match="is longer than the 255 bytes that a name in the stream can have"):
        writer.string("é" * 128)
    writer.flush()
    assert len(sink.data) == 1 + 254


def test_peeking_consumes_nothing() -> None:
    reader = StreamReader(Chunks(b"abcdef", [1]), size=8)
    assert reader.peek(3) == b"abc"
    assert reader.offset == 0
    assert not reader.at_end()
    assert reader.read(2, "it") == b"ab"
    assert reader.peek(10) == b"cdef"
    assert reader.offset == 2


def test_large_reads_go_straight_to_where_they_belong() -> None:
    source = Chunks(b"h" + b"p" * 1000, [1, 1000])
    reader = StreamReader(source, size=16)
    assert reader.u8("the header") == ord("h")
    page = bytearray(1000)
    reader.read_into(memoryview(page), "the page")
    assert source.turn == 2, "one receive for the header, one for the page"
    assert page == b"p" * 1000
    assert reader.offset == 1001


def test_handlers_that_parse_the_buffer_themselves() -> None:
    data = bytes(range(200))
    reader = StreamReader(Chunks(data, [7]), size=16)
    buffer, seen = reader.buffer, bytearray()
    while reader.fill():
        start, end = reader.span()
        assert reader.offset == len(seen)
        take = max(1, end - start - 3)  # leave something behind, as a record cut in two does
        seen += buffer[start : start + take]
        reader.skip(take)
    start, end = reader.span()
    seen += buffer[start:end]
    assert bytes(seen) == data
    assert reader.buffer is buffer


def test_filling_a_full_buffer_is_a_bug() -> None:
    reader = StreamReader(MemorySource(b"x" * 20), size=8)
    assert reader.fill()
    with pytest.raises(AssertionError, match="full buffer"):
        reader.fill()


def test_small_values_gather_and_a_payload_goes_out_beside_them() -> None:
    parts = Parts()
    writer = StreamWriter(parts)
    writer.be16(0x6162)
    writer.string("c")
    assert parts.calls == []
    assert writer.position == 4
    writer.payload(memoryview(b"payload"))
    assert parts.calls == [(b"ab\x01c", b"payload")]
    writer.payload(b"more")
    assert parts.calls[1:] == [(b"more",)]
    writer.flush()
    assert len(parts.calls) == 2, "nothing to flush"
    assert writer.position == 15


def test_many_small_values_do_not_gather_without_bound() -> None:
    parts = Parts()
    writer = StreamWriter(parts)
    for _ in range(9):
        writer.write(b"x" * (BUFFER_SIZE // 4))
    assert [len(b"".join(call)) for call in parts.calls] == [BUFFER_SIZE, BUFFER_SIZE]
    writer.flush()
    assert writer.position == 9 * (BUFFER_SIZE // 4)


def test_a_payload_is_counted_in_bytes() -> None:
    sink = MemorySink()
    writer = StreamWriter(sink)
    writer.payload(memoryview(bytearray(16)).cast("I"))
    assert writer.position == len(sink.data) == 16


def test_what_was_handed_over_may_change_afterwards() -> None:
    sink = MemorySink()
    writer = StreamWriter(sink)
    page = bytearray(b"before")
    writer.write(page)
    writer.payload(page)
    page[:] = b"after!"
    assert sink.data == b"beforebefore"


class IntoMemory(Chunks, ReceivesMemory):
    """Receives into pieces of memory too: here always into one byte of the first."""

    def receive_memory(self, pieces: np.typing.NDArray[np.uint64]) -> int:
        one = bytearray(1)
        count = self.receive_into(memoryview(one))
        ctypes.memmove(int(pieces[0, 0]), bytes(one), count)
        return count


def test_what_passes_the_buffer_counts_and_can_be_put_back() -> None:
    reader = StreamReader(IntoMemory(b"abcdef", [2]), size=4)
    assert reader.receives_memory and not StreamReader(MemorySource(b"")).receives_memory
    assert reader.read(2, "word") == b"ab"
    room = np.zeros(1, dtype=np.uint8)
    assert reader.receive_memory(np.array([[room.ctypes.data, 1]], dtype=np.uint64)) == 1
    assert room.tobytes() == b"c" and reader.offset == 3
    reader.unread(b"bc")
    assert reader.offset == 1
    assert reader.read(4, "word") == b"bcde"
    assert reader.offset == 5
    assert reader.read(1, "word") == b"f" and reader.at_end()
