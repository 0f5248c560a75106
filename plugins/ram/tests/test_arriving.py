"""Pages that arrive while the guest runs: whatever comes, over either channel and in any portions, compiled code and
Python end with the same RAM, and a page that has arrived is never stored again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Final, NamedTuple

import numpy as np
import pytest
from corefw_ram.kernel import find_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from corefw.errors import ANYTHING, RemoteStreamError
from corefw.machine import FaultSource, GuestMapping, RamBlock
from corefw.wire.stream import StreamReader
from tests.helpers.ram import (
    EOS,
    PAGE,
    MemoryPortions,
    Portions,
    Receiver,
    SocketPortions,
    StillMachine,
    block,
    fill_record,
    noise,
    page_record,
    receiving,
)

PAGES: Final = 160
CONTENT: Final = noise(PAGES)
CONTENT[::9] = 0  # those are sent as zero pages
GUEST: Final = 0xA5
RECORD: Final = 8 + PAGE
WHOLE: Final = 1 << 22

Source = Portions | SocketPortions


class Unwatched(FaultSource):
    """A guest that waits for nothing; compiled code may receive into its RAM, or not."""

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled

    def fileno(self) -> int:
        return -1

    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        return {}

    def install(self, block: RamBlock, runs: NDArray[np.int64]) -> None:
        pass

    def mapping(self, block: RamBlock) -> GuestMapping | None:
        return GuestMapping(-1, 0) if self._compiled else None

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


class Way(NamedTuple):
    """How bytes come, and what receives them."""

    source: type[MemoryPortions | SocketPortions]
    compiled: bool


WAYS: Final = pytest.mark.parametrize(
    "way",
    [
        pytest.param(Way(MemoryPortions, compiled=False), id="python"),
        *(
            pytest.param(
                Way(source, compiled=True),
                id=f"compiled-{source.__name__}",
                marks=pytest.mark.skipif(find_kernel() is None, reason="needs plugins/ram_kernel"),
            )
            for source in (MemoryPortions, SocketPortions)
        ),
    ],
)


def record(page: int, idstr: str | None = None) -> bytes:
    data = CONTENT[page].tobytes()
    return page_record(page, data, idstr) if any(data) else fill_record(page, 0, idstr)


class Arrival(NamedTuple):
    """A destination that has begun to run its guest. Every page that was not discarded has the guest's contents."""

    ram: RamBlock
    receiver: Receiver

    def load(self, source: Source, bodies: int) -> None:
        self.receiver.reader = StreamReader(source, where="section 'ram'")
        self.receiver.load(bodies)

    def load_requested(self, source: Source) -> None:
        self.receiver.loader.load_requested(StreamReader(source, where="requested pages"))

    def received(self) -> set[int]:
        return set(np.flatnonzero(self.receiver.loader.received("ram")).tolist())

    def write_as_guest(self) -> None:
        """The guest writes to every page that it may see."""
        self.ram.pages[sorted(self.received())] = GUEST

    def written(self) -> set[int]:
        return set(np.flatnonzero((self.ram.pages == GUEST).all(axis=1)).tolist())

    def right(self) -> set[int]:
        return set(np.flatnonzero((self.ram.pages == CONTENT).all(axis=1)).tolist())


@contextmanager
def arriving(way: Way, discarded: Sequence[int], *, huge: bool = True) -> Iterator[Arrival]:
    ram = block("ram", PAGES)
    ram.huge = huge  # it is too small for that, and works without
    with StillMachine(ram) as machine, receiving(machine, MemoryPortions(b"", [1])) as receiver:
        ram.pages[:] = GUEST
        for page in discarded:
            receiver.loader.discard("ram", page * PAGE, PAGE)
        receiver.loader.listen(Unwatched(way.compiled))
        yield Arrival(ram, receiver)


pages_sent = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)), min_size=1, max_size=8
)  # runs: the first page, and how many
portions = st.lists(st.integers(1, 20 * RECORD), min_size=1, max_size=5) | st.just([WHOLE]) | st.just([RECORD - 3])
some_pages = st.lists(st.integers(0, PAGES - 1), unique=True, max_size=40)


def numbers(runs: Sequence[tuple[int, int]]) -> list[int]:
    return [page for first, count in runs for page in range(first, min(first + count, PAGES))]


def bodies_of(runs: Sequence[tuple[int, int]], cuts: set[int]) -> tuple[bytes, int]:
    """A stream with these runs, and how many bodies it has: another one begins at the runs in `cuts`."""
    made, bodies = b"", 1
    for number, run in enumerate(runs):
        if number and number in cuts:
            made, bodies = made + EOS, bodies + 1
        made += b"".join(record(page, "ram" if not made else None) for page in numbers([run]))
    return made + EOS, bodies


@WAYS
@settings(max_examples=15, deadline=None)
@given(runs=pages_sent, cuts=st.sets(st.integers(1, 7)), sizes=portions, kept=some_pages, huge=st.booleans())
def test_what_was_discarded_is_stored_and_nothing_else(
    way: Way, runs: list[tuple[int, int]], cuts: set[int], sizes: list[int], kept: list[int], huge: bool
) -> None:
    missing = sorted(set(range(PAGES)) - set(kept))
    data, bodies = bodies_of(runs, cuts)
    with arriving(way, missing, huge=huge) as arrival, closing(way.source(data, sizes)) as source:
        arrival.load(source, bodies)
        sent = set(numbers(runs))
        assert arrival.received() == sent | set(kept)
        assert arrival.right() & arrival.received() == sent - set(kept)
        assert arrival.written() & arrival.received() == set(kept), "these had arrived before"


@WAYS
@settings(max_examples=15, deadline=None)
@given(data=st.data(), sizes=portions, kept=some_pages)
def test_after_a_break_everything_that_is_missing_can_come_again(
    way: Way, data: st.DataObject, sizes: list[int], kept: list[int]
) -> None:
    missing = sorted(set(range(PAGES)) - set(kept))
    whole, bodies = bodies_of([(data.draw(st.integers(0, PAGES - 1)), PAGES), (0, PAGES)], {1})
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with arriving(way, missing) as arrival:
        with closing(way.source(cut, sizes)) as source, pytest.raises(RemoteStreamError, match="the end of the stream"):
            arrival.load(source, bodies)
        before = arrival.received()
        assert before - set(kept) <= arrival.right(), "half a page is not received"
        arrival.write_as_guest()
        with closing(way.source(whole, sizes)) as source:
            arrival.load(source, bodies)
        assert arrival.received() == set(range(PAGES))
        assert arrival.written() == before
        assert arrival.right() == set(range(PAGES)) - before


@WAYS
@settings(max_examples=15, deadline=None)
@given(data=st.data(), sizes=portions)
def test_a_changed_header_stores_nothing_that_python_would_not(way: Way, data: st.DataObject, sizes: list[int]) -> None:
    stream = bytearray(bodies_of([(0, PAGES)], set())[0])
    at = data.draw(st.integers(0, len(stream) - 9))
    for place in range(at, at + 8):
        stream[place] ^= data.draw(st.sampled_from([0, 1, 2, 0x10, 0x80, 0xFF]))
    found = []
    for one in (Way(MemoryPortions, compiled=False), way):
        with (
            arriving(one, range(PAGES)) as arrival,
            closing(one.source(bytes(stream), [WHOLE] if one is not way else sizes)) as source,
        ):
            try:
                arrival.load(source, 1)
                error = ""
            except RemoteStreamError as caught:
                error = str(caught)
            received = sorted(arrival.received())
            found.append((error, received, arrival.ram.pages[received].tobytes()))
    assert found[0] == found[1]


@WAYS
@settings(max_examples=15, deadline=None)
@given(runs=pages_sent, sizes=portions, requested=some_pages, requested_sizes=portions)
def test_pages_that_come_over_both_channels_at_once_are_all_there(
    way: Way, runs: list[tuple[int, int]], sizes: list[int], requested: list[int], requested_sizes: list[int]
) -> None:
    """Some of them come twice. The stream's guesses and the other channel's pages meet, and none is lost."""
    stream, bodies = bodies_of(runs, {2, 5})
    urgent = b"".join(record(page, "ram" if not at else None) for at, page in enumerate(requested)) + EOS
    errors: list[BaseException] = []
    with (
        arriving(way, range(PAGES)) as arrival,
        closing(way.source(stream, sizes)) as source,
        closing(way.source(urgent, requested_sizes)) as other,
    ):

        def load_requested() -> None:
            try:
                arrival.load_requested(other)
            except ANYTHING as error:
                errors.append(error)

        thread = threading.Thread(target=load_requested)
        thread.start()
        arrival.load(source, bodies)
        thread.join()
        assert errors == []
        sent = set(numbers(runs)) | set(requested)
        assert arrival.received() == sent
        assert arrival.right() & sent == sent
        arrival.write_as_guest()
        rest, bodies = bodies_of([(0, PAGES)], set())
        with closing(way.source(rest, sizes)) as again:
            arrival.load(again, bodies)
        assert arrival.received() == set(range(PAGES)), "no claim was left"
        assert arrival.written() == sent


@WAYS
@settings(max_examples=15, deadline=None)
@given(data=st.data(), sizes=portions)
def test_requested_pages_that_break_off_can_come_again(way: Way, data: st.DataObject, sizes: list[int]) -> None:
    pages = data.draw(st.lists(st.integers(0, PAGES - 1), unique=True, min_size=1, max_size=20))
    urgent = b"".join(record(page, "ram" if not at else None) for at, page in enumerate(pages)) + EOS
    cut = urgent[: data.draw(st.integers(0, len(urgent) - 1))]
    with arriving(way, range(PAGES)) as arrival:
        with closing(way.source(cut, sizes)) as source, pytest.raises(RemoteStreamError, match="the end of the stream"):
            arrival.load_requested(source)
        before = arrival.received()
        assert before <= arrival.right()
        arrival.write_as_guest()
        with closing(way.source(urgent, sizes)) as source:
            arrival.load_requested(source)
        assert arrival.received() == set(pages)
        assert arrival.written() & set(pages) == before
