"""The destination's half: what each record does to RAM, and how wrong ones are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.errors import RemoteStreamError
from corefw.wire.constants import BE64, RAM_VERSION, RamFlag
from corefw.wire.records import MAX_BLOCKS
from tests.helpers.ram import (
    EOS,
    PAGE,
    MakingMachine,
    Portions,
    StillMachine,
    allocated,
    apply,
    block,
    block_list,
    fill_record,
    header,
    load,
    name,
    noise,
    page_record,
    page_records,
    receiving,
)

HUGE = 512
"""Pages in a huge one of the host's."""
LONG = 64
"""Records of one kind that surely count as a run of them."""


def page(value: int) -> bytes:
    return bytes([value]) * PAGE


def refused(machine: StillMachine, body: bytes) -> RemoteStreamError:
    with pytest.raises(RemoteStreamError) as caught:
        load(machine, body)
    assert "\n" not in str(caught.value)
    assert caught.value.where == "section 'ram'"
    assert 0 < caught.value.offset <= len(body)
    return caught.value


# -- pages ---------------------------------------------------------------------------------------------------------


def test_pages_and_fill_bytes_go_where_they_belong() -> None:
    with StillMachine(block("one", 4), block("two", 2)) as machine:
        load(
            machine,
            block_list(one=4, two=2) + EOS,
            page_record(1, page(0x11), "one") + fill_record(3, 0xEE) + page_record(0, page(0x22), "two") + EOS,
            fill_record(1, 0x33) + EOS,  # goes on with the block of the body before
        )
        assert machine.contents() == {
            "one": page(0) + page(0x11) + page(0) + page(0xEE),
            "two": page(0x22) + page(0x33),
        }


def test_a_later_page_replaces_an_earlier_one() -> None:
    """In one run of records, in any order."""
    order = [5, 3, 5, 4, 0, 1, 2, 3, 3, 5, 63, 5, *range(LONG)]
    records = [page_record(number, page(1 + turn)) for turn, number in enumerate(order)]
    with StillMachine(block("ram", LONG)) as machine:
        machine.blocks[0].pages[:] = 0xFF
        load(machine, fill_record(0, 0, "ram") + b"".join(records) + EOS)
        assert machine.blocks[0].pages[:, 0].tolist() == [1 + len(order) - LONG + n for n in range(LONG)]
        load(machine, fill_record(0, 0, "ram") + b"".join(reversed(records)) + EOS)
        last = {number: 1 + turn for turn, number in reversed(list(enumerate(order)))}
        assert machine.blocks[0].pages[:, PAGE - 1].tolist() == [last[n] for n in range(LONG)]


def test_a_later_fill_byte_replaces_an_earlier_one() -> None:
    with StillMachine(block("ram", LONG)) as machine:
        machine.blocks[0].pages[:] = 0xFF
        fills = [9, 0, 200, 0, 7, 0]
        records = [fill_record(number, value) for value in fills for number in range(LONG)]
        load(machine, fill_record(0, 1, "ram") + b"".join(records) + EOS)
        assert not machine.blocks[0].pages.any()
        load(machine, fill_record(0, 1, "ram") + b"".join(records[: 5 * LONG]) + fill_record(3, 0) + EOS)
        assert machine.blocks[0].pages[:, 17].tolist() == [7, 7, 7, 0] + [7] * (LONG - 4)


def test_a_zero_page_empties_what_was_there() -> None:
    for count in (1, LONG):
        with StillMachine(block("ram", LONG)) as machine:
            machine.blocks[0].pages[:] = noise(LONG)
            kept = bytes(machine.blocks[0].view[count * PAGE :])
            records = [fill_record(number) for number in range(1, count)]
            load(machine, fill_record(0, 0, "ram") + b"".join(records) + EOS)
            assert machine.contents()["ram"] == bytes(count * PAGE) + kept


def test_zero_pages_leave_alone_what_was_never_touched() -> None:
    pages = 20_000
    with StillMachine(block("ram", pages), block("rom", 1)) as machine:
        ram, rom = machine.blocks
        ram.pages[777] = 1
        before = allocated(ram)
        load(
            machine,
            fill_record(0, 0, "ram") + b"".join(fill_record(number) for number in range(1, pages)) + EOS,
            fill_record(0, 0, "rom") + EOS,
            fill_record(778, 0, "ram") + EOS,
        )
        assert allocated(ram) <= before  # it may be given back
        assert allocated(rom) == 0
        assert not ram.pages[777].any()


def test_only_what_is_sent_is_allocated() -> None:
    """The block is large and the page alone: nothing is touched but the page of the host's that it is in."""
    with StillMachine(block("ram", 1 << 20)) as machine:
        load(machine, page_record(900_000, page(3), "ram") + EOS)
        (start, first), (end, last) = machine.blocks[0].holes().tolist()
        assert (start, last) == (0, 1 << 20)
        assert first <= 900_000 < end <= first + HUGE


# -- any records in any portions -----------------------------------------------------------------------------------

BLOCKS = {"one": 12, "two": 5}

numbers = st.integers(0, 11)
fills = st.sampled_from([0, 0, 0, 1, 255])
names = st.sampled_from([None, None, None, "one", "two"])


@st.composite
def bodies(draw: st.DrawFn) -> list[bytes]:
    """Some bodies of records as no sane source would mix them: runs of one kind, single ones, repeated pages."""
    made: list[bytes] = []
    current: str | None = None
    for _ in range(draw(st.integers(1, 3))):
        records: list[bytes] = []
        for _ in range(draw(st.integers(0, 6))):
            idstr = draw(names) if current else "one"  # the very first record has to name its block
            current = idstr or current
            assert current is not None
            start, length = draw(numbers), draw(st.integers(1, 12))
            full, value = draw(st.booleans()), draw(fills)
            for turn in range(length):
                number = (start + turn) % BLOCKS[current]
                who = idstr if turn == 0 else None
                data = page(value or turn) if full else b""
                records.append(page_record(number, data, who) if full else fill_record(number, value, who))
        made.append(b"".join(records) + EOS)
    return made


@settings(max_examples=80)
@given(
    bodies=bodies(),
    sizes=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=6) | st.just([1]) | st.just([1 << 20]),
    buffer=st.sampled_from([PAGE + 8, 5 * PAGE, 1 << 20]),
)
def test_records_mean_the_same_in_any_portions(bodies: list[bytes], sizes: list[int], buffer: int) -> None:
    with StillMachine(*(block(idstr, pages) for idstr, pages in BLOCKS.items())) as machine:
        for one in machine.blocks:
            one.pages[1::2] = 0x5A
        expected = {idstr: bytearray(data) for idstr, data in machine.contents().items()}
        apply(page_records(*bodies), expected)
        load(machine, *bodies, sizes=sizes, buffer=buffer)
        assert machine.contents() == expected


# -- the list of blocks --------------------------------------------------------------------------------------------


def test_the_order_of_the_blocks_does_not_matter() -> None:
    with StillMachine(block("one", 4), block("two", 2)) as machine:
        load(machine, block_list(two=2, one=4) + EOS)


@pytest.mark.parametrize(
    ("body", "expected", "got"),
    [
        (block_list(one=4), "all RAM blocks of this machine (one, two)", "none 'two'"),
        (block_list(), "all RAM blocks of this machine (one, two)", "none 'one'"),
        (block_list(one=4, two=2, more=1), "one of the RAM blocks one, two", "block 'more'"),
        (block_list(one=4, Two=2), "one of the RAM blocks one, two", "block 'Two'"),
        (
            block_list(one=4, two=3),
            "RAM block 'two' of 8192 bytes (8.0 KiB)",
            "one of 12288 bytes (12.0 KiB); start both sides with the same RAM size",
        ),
        (header(5, RamFlag.MEM_SIZE) + (name("one") + BE64.pack(4 * PAGE)) * 2, "20480 bytes in all", "of the last"),
        (header(8, RamFlag.MEM_SIZE) + (name("one") + BE64.pack(4 * PAGE)) * 2, "each RAM block once", "'one' again"),
        (
            header(MAX_BLOCKS + 1, RamFlag.MEM_SIZE)
            + b"".join(name(str(number)) + BE64.pack(PAGE) for number in range(MAX_BLOCKS + 1)),
            f"at most {MAX_BLOCKS} RAM blocks",
            "more",
        ),
        (header(1, RamFlag.MEM_SIZE) + b"\2\xff\xfe" + BE64.pack(PAGE), "the name of a RAM block as text", r"b'\xff"),
    ],
)
def test_other_blocks_are_refused(body: bytes, expected: str, got: str) -> None:
    with StillMachine(block("one", 4), block("two", 2)) as machine:
        error = refused(machine, body + EOS)
        assert expected in error.expected
        assert got in error.got


def test_a_machine_without_ram_says_so() -> None:
    with StillMachine() as machine:
        load(machine, block_list() + EOS)
        assert refused(machine, block_list(ram=1) + EOS).expected == "one of the RAM blocks (none)"
        assert refused(machine, fill_record(0, 0, "ram") + EOS).expected == "one of the RAM blocks (none)"


def test_blocks_are_made_as_the_stream_brings_them() -> None:
    with MakingMachine() as machine:
        load(machine, block_list(ram=6, rom=1) + EOS, page_record(5, page(1), "ram") + EOS)
        assert machine.contents() == {"ram": bytes(5 * PAGE) + page(1), "rom": bytes(PAGE)}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (block_list(ram=200, rom=100), "more than the 1048576 allowed"),
        (block_list(ram=1 << 40), "more than the 1048576 allowed"),
        (
            header(1, RamFlag.MEM_SIZE) + name("odd") + BE64.pack(5) + name("x") + BE64.pack(PAGE - 5),
            "'odd' with 5 bytes is no RAM block here",
        ),
    ],
)
def test_a_machine_that_makes_blocks_may_refuse(body: bytes, reason: str) -> None:
    with MakingMachine(limit=1 << 20) as machine:
        error = refused(machine, body + EOS)
        assert error.expected == "RAM blocks that this machine can have"
        assert reason in error.got


# -- records that are refused --------------------------------------------------------------------------------------

OTHERS_WORK = {
    RamFlag.FULL: "an obsolete kind (RAM_SAVE_FLAG_FULL; send it again from a newer QEMU)",
    RamFlag.XBZRLE: "an XBZRLE page (switch capability 'xbzrle' off on the source)",
    RamFlag.HOOK: "an RDMA record (migrate with another transport than rdma:)",
    RamFlag.COMPRESS_PAGE: "a compressed page (switch capability 'compress' off on the source)",
    RamFlag.MULTIFD_FLUSH: "a multifd record (switch capability 'multifd' off on the source)",
}
KINDS = (RamFlag.PAGE, RamFlag.ZERO, RamFlag.MEM_SIZE, RamFlag.EOS)


@pytest.mark.parametrize("flag", OTHERS_WORK, ids=lambda flag: flag.name)
@pytest.mark.parametrize("more", [0, RamFlag.CONTINUE])
@pytest.mark.parametrize("before", [0, LONG], ids=["at once", "behind a run"])
def test_what_other_plugins_would_read_is_refused_with_what_to_do(flag: RamFlag, more: int, before: int) -> None:
    run = fill_record(0, 7, "ram") + b"".join(fill_record(number, 7) for number in range(1, before))
    with StillMachine(block("ram", LONG)) as machine:
        error = refused(machine, (run if before else b"") + header(2, flag | more) + bytes(2 * PAGE))
        assert error.expected == "a RAM record"
        assert OTHERS_WORK[flag] in error.got
        assert error.offset == (len(run) if before else 0) + 8
        assert (machine.blocks[0].pages[:before] == 7).all()


@pytest.mark.parametrize(
    "flags",
    [
        *(0, 0x400, 0x800, 0xFFF, RamFlag.CONTINUE),
        *(kind | 0x400 for kind in KINDS),
        *(RamFlag.PAGE | other for other in (RamFlag.ZERO, RamFlag.EOS, RamFlag.XBZRLE)),
        *(RamFlag.MEM_SIZE | other for other in (RamFlag.CONTINUE, RamFlag.EOS)),
        RamFlag.EOS | RamFlag.CONTINUE,
    ],
    ids=hex,
)
def test_any_other_flags_are_refused(flags: int) -> None:
    with StillMachine(block("ram", 4)) as machine:
        error = refused(machine, header(1, flags) + name("ram") + bytes(2 * PAGE))
        assert error.got == f"one with the flags {flags:#x}"
        assert error.offset == 8
        assert allocated(machine.blocks[0]) == 0


def test_the_first_record_has_to_name_its_block() -> None:
    for records in (page_record(0, page(1)), fill_record(0, 1), fill_record(0) * LONG, page_record(0, page(1)) * LONG):
        with StillMachine(block("ram", 4)) as machine:
            assert refused(machine, records + EOS).expected == "a record that names its RAM block"
            assert allocated(machine.blocks[0]) == 0


def test_an_unknown_block_is_refused() -> None:
    with StillMachine(block("ram", 4), block("rom", 1)) as machine:
        error = refused(machine, fill_record(0, 1, "ram") + page_record(0, page(1), "vga") + EOS)
        assert (error.expected, error.got) == ("one of the RAM blocks ram, rom", "block 'vga'")


@pytest.mark.parametrize("number", [4, 5, 1 << 40, (1 << 52) - 1], ids=hex)
@pytest.mark.parametrize("full", [False, True], ids=["fill byte", "page"])
@pytest.mark.parametrize("before", [0, LONG], ids=["at once", "in a run"])
def test_an_offset_outside_the_block_is_refused(number: int, full: bool, before: int) -> None:
    def record(at: int, idstr: str | None = None) -> bytes:
        return page_record(at, page(1), idstr) if full else fill_record(at, 1, idstr)

    run = record(0, "ram") + b"".join(record(turn % 4) for turn in range(before))
    with StillMachine(block("ram", 4), block("rom", 900)) as machine:
        more = record(1) * LONG if before else b""  # so that it stands alone, or in the middle
        error = refused(machine, run + record(number) + more + EOS)
        assert error.expected == "an offset below 0x4000 in RAM block 'ram'"
        assert error.got == f"{number * PAGE:#x}"
        assert len(run) <= error.offset <= len(run) + 8
        assert not machine.blocks[1].pages.any()


def test_the_end_of_the_body_is_the_end_of_what_is_read() -> None:
    """What follows may look like more records."""
    behind = fill_record(1, 9) * LONG
    body = fill_record(0, 1, "ram") + fill_record(2, 1) * LONG + EOS
    with StillMachine(block("ram", 4)) as machine:
        with receiving(machine, Portions(body + behind, (1 << 20,))) as receiver:
            receiver.load()
            assert receiver.reader.offset == len(body)
        assert not machine.blocks[0].pages[1].any()


@pytest.mark.parametrize("version", [0, 3, 5])
def test_other_versions_are_refused(version: int) -> None:
    with (
        StillMachine(block("ram", 4)) as machine,
        receiving(machine, Portions(EOS, (8,))) as receiver,
        pytest.raises(RemoteStreamError, match=f"version {RAM_VERSION} of section 'ram', got version {version}"),
    ):
        receiver.loader.load(receiver.reader, version)


def test_many_pages_out_of_a_small_buffer() -> None:
    """The receive buffer holds one record and a bit."""
    pages = noise(200)
    with StillMachine(block("ram", 200)) as machine:
        records = [page_record(number, bytes(data)) for number, data in enumerate(pages)]
        load(machine, fill_record(0, 0, "ram") + b"".join(records) + EOS, buffer=PAGE + 16)
        assert np.array_equal(machine.blocks[0].pages, pages)
