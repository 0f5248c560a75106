"""Pages received straight into RAM: whatever comes, it is as if they had been read into a buffer first."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from corefw_ram.direct import FIRST, RUN
from corefw_ram.lists import MOST
from corefw_ram.records import PAGE_RECORD as RECORD
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.errors import RemoteStreamError
from tests.helpers.ram import (
    EOS,
    PAGE,
    MemoryPortions,
    Portions,
    SocketPortions,
    StillMachine,
    allocated,
    block,
    fill_record,
    noise,
    page_record,
    receiving,
)

PAGES: Final = 3 * FIRST
CONTENT: Final = noise(PAGES)

WHOLE: Final = 1 << 22
"""Bytes: everything at once."""

Outcome = tuple[dict[str, bytes], str, int]
Way = type[Portions | SocketPortions]

WAYS: Final = pytest.mark.parametrize("way", [MemoryPortions, SocketPortions])
"""How bytes come straight into memory: through the loop in NumPy, and through compiled code where it is installed."""


def outcome(stream: bytes, sizes: list[int], way: Way, *, bodies: int = 1, touched: bool = False) -> Outcome:
    """RAM afterwards (of a load that failed, only what the stream did not touch counts: nothing), the error, the
    offset."""
    with StillMachine(block("one", PAGES), block("two", RUN)) as machine:
        for one in machine.blocks:
            one.huge = True  # it is too small for that, and works without
            if touched:
                one.pages[::7] = 0x5A
        with closing(way(stream, sizes)) as source, receiving(machine, source) as receiver:
            try:
                receiver.load(bodies)
            except RemoteStreamError as error:
                return {}, str(error), error.offset
            return machine.contents(), "", receiver.reader.offset


def run(first: int, count: int, idstr: str | None = None) -> bytes:
    pages = range(first, first + count)
    return b"".join(page_record(page, CONTENT[page].tobytes(), idstr if page == first else None) for page in pages)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, int]:
    """Bodies with long runs, broken off by all that may come in between; and how many they are."""
    bodies = draw(st.integers(1, 3))
    made = b""
    for body in range(bodies):
        made += run(draw(st.integers(0, 5)), draw(st.integers(1, 12)), "one" if body == 0 else None)
        for _ in range(draw(st.integers(0, 3))):
            first = draw(st.integers(0, PAGES - 1))
            match draw(st.sampled_from(["run", "run", "zeros", "fill", "other"])):
                case "run":
                    made += run(first, draw(st.integers(1, PAGES - first)))
                case "zeros":
                    made += b"".join(fill_record(page) for page in range(first, min(first + 9, PAGES)))
                case "fill":
                    made += fill_record(first, 7)
                case "other":
                    made += run(0, RUN, "two") + page_record(first, CONTENT[first].tobytes(), "one")
        made += EOS
    return made, bodies


portions = st.lists(st.integers(1, 20 * RECORD), min_size=1, max_size=5) | st.just([WHOLE]) | st.just([RECORD - 3])


@WAYS
@settings(max_examples=150)
@given(stream=streams(), sizes=portions, touched=st.booleans())
def test_records_mean_the_same(way: Way, stream: tuple[bytes, int], sizes: list[int], touched: bool) -> None:
    data, bodies = stream
    expected = outcome(data, [WHOLE], Portions, bodies=bodies, touched=touched)
    assert expected[1] == ""
    assert outcome(data, sizes, way, bodies=bodies, touched=touched) == expected


@WAYS
@settings(max_examples=80)
@given(data=st.data(), sizes=portions)
def test_a_stream_that_ends_early_fails_at_the_same_place(way: Way, data: st.DataObject, sizes: list[int]) -> None:
    whole = run(0, PAGES, "one") + EOS
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert outcome(cut, sizes, way) == outcome(cut, sizes, Portions)


@WAYS
@settings(max_examples=150)
@given(data=st.data(), sizes=portions)
def test_a_changed_header_means_the_same(way: Way, data: st.DataObject, sizes: list[int]) -> None:
    stream = bytearray(run(0, PAGES, "one") + EOS)
    at = 4 + data.draw(st.integers(0, PAGES - 1)) * RECORD + data.draw(st.integers(0, 7))
    stream[at] ^= data.draw(st.sampled_from([1, 2, 0x10, 0x80, 0xFF]))
    assert outcome(bytes(stream), sizes, way) == outcome(bytes(stream), sizes, Portions)


@WAYS
@pytest.mark.parametrize("extra", range(RECORD - 12, RECORD + 5))
def test_what_follows_the_body_is_not_waited_for(way: Way, extra: int) -> None:
    """A guess that the run goes on takes in what is behind the body too, and a few bytes of that look like a header
    that has begun; but they are the last, for the source waits for an answer."""
    stream = run(0, 2 * RUN, "one") + EOS + bytes(range(1, 8)) * (RECORD // 7 + 1)
    stream = stream[: stream.index(EOS) + len(EOS) + extra]
    sizes = [4 + 2 * RUN * RECORD, WHOLE]
    assert outcome(stream, sizes, way) == outcome(stream, sizes, Portions)


@WAYS
def test_what_was_guessed_wrongly_is_zero_again(way: Way) -> None:
    """The first guess after the run is that it goes on; what comes is the same pages once more."""
    stream = run(0, 2 * RUN, "one") + run(0, 2 * RUN) + EOS
    contents, error, offset = outcome(stream, [4 + 2 * RUN * RECORD, WHOLE], way)
    assert (error, offset) == ("", len(stream))
    assert contents["one"] == CONTENT[: 2 * RUN].tobytes() + bytes((PAGES - 2 * RUN) * PAGE)


@WAYS
def test_a_block_that_had_contents_keeps_what_no_record_says(way: Way) -> None:
    stream = run(0, 2 * RUN, "one") + run(0, 2 * RUN) + EOS
    contents, _, _ = outcome(stream, [4 + 2 * RUN * RECORD, WHOLE], way, touched=True)
    rest = np.frombuffer(contents["one"], dtype=np.uint8).reshape(-1, PAGE)[2 * RUN :]
    assert (rest[:, 0] == np.where(np.arange(2 * RUN, PAGES) % 7, 0, 0x5A)).all()


class Counting(MemoryPortions):
    """How many calls and bytes went straight into memory."""

    calls = direct = 0

    def receive_memory(self, pieces: np.typing.NDArray[np.uint64]) -> int:
        count = super().receive_memory(pieces)
        self.calls += 1
        self.direct += count
        return count


def test_a_long_run_goes_straight_into_memory_in_ever_larger_steps() -> None:
    pages = 4 * MOST
    content = noise(pages)
    stream = b"".join(page_record(n, content[n].tobytes(), "ram" if n == 0 else None) for n in range(pages)) + EOS
    source = Counting(stream, [4 + 2 * RUN * RECORD, *[WHOLE] * 100])
    with StillMachine(block("ram", pages)) as machine:
        machine.blocks[0].huge = True
        with receiving(machine, source, buffer=WHOLE) as receiver:
            receiver.load()
        assert machine.contents()["ram"] == content.tobytes()
        assert source.direct == (pages - 2 * RUN) * RECORD
        assert source.calls == 4 + 3 + 1  # 32, 64, 128, 256, then 512 at a time, and what is left


def test_memory_that_was_allocated_in_advance_is_received_into_as_well() -> None:
    stream = run(0, PAGES, "one") + EOS
    source = Counting(stream, [4 + 2 * RUN * RECORD, *[WHOLE] * 100])
    with StillMachine(block("one", PAGES)) as machine:
        one = machine.blocks[0]
        one.huge = True
        one.known_zero = one.holes()
        one.pages[:] = 0
        assert allocated(one) == PAGES
        with receiving(machine, source) as receiver:
            receiver.load()
        assert machine.contents()["one"] == CONTENT.tobytes()
        assert source.direct == (PAGES - 2 * RUN) * RECORD


@pytest.mark.parametrize("huge", [False, True])
def test_small_pages_are_stored_from_the_buffer(huge: bool) -> None:
    stream = run(0, PAGES, "one") + EOS
    source = Counting(stream, [4 + 2 * RUN * RECORD, *[WHOLE] * 100])
    with StillMachine(block("one", PAGES)) as machine:
        machine.blocks[0].huge = huge
        with receiving(machine, source) as receiver:
            receiver.load()
        assert (source.calls > 0) is huge
        assert allocated(machine.blocks[0]) == PAGES


@pytest.mark.parametrize(
    ("value", "warning"),
    [
        ("nowhere_to_be_found:Kernel", "does not load, and is not used: No module named"),
        ("os:getcwd", "is too old, and is not used: it has no receive_lists, ArrivingBlock, DirtyBlock"),
    ],
)
def test_a_compiled_loop_that_is_of_no_use_is_passed_over_with_a_warning(
    tmp_path: Path, value: str, warning: str
) -> None:
    about = tmp_path / "a_broken_kernel-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: a-broken-kernel\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[corefw.kernel]\nram = {value}\n")
    script = "from corefw_ram.kernel import find_kernel; print(getattr(find_kernel(), '__module__', None))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"{value} {warning}" in done.stderr
    assert done.stdout in ("None\n", "corefw_ram_kernel\n")
