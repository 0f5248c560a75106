"""Parsing of sizes and times."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.errors import UsageError, one_line
from corefw.quantities import (
    format_duration,
    format_milliseconds,
    format_size,
    parse_milliseconds,
    parse_seconds,
    parse_size,
    parse_switch,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("32MiB", 32 << 20),
        ("32MB", 32 << 20),
        ("1.5GiB", 3 << 29),
        ("2 t", 2 << 40),
        ("1P", 1 << 50),
        ("15E", 15 << 60),
        (" 100MB/s ", 100 << 20),
        ("0.3", 0),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("300", 300), ("300ms", 300), ("0.3s", 300), ("2 m", 120_000), ("1500us", 1), ("0", 0)]
)
def test_times(text: str, expected: int) -> None:
    assert parse_milliseconds(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("10", 10), ("10s", 10), ("2m", 120), ("1500ms", 2), ("1ms", 1), ("0", 0)]
)
def test_seconds(text: str, expected: int) -> None:
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("word", ["on", "yes", "TRUE", " On "])
@pytest.mark.parametrize("opposite", ["off", "no", "False"])
def test_switches(word: str, opposite: str) -> None:
    assert parse_switch(word) is True
    assert parse_switch(opposite) is False


@pytest.mark.parametrize("text", ["", "1", "0", "perhaps", "onn"])
def test_what_is_no_switch(text: str) -> None:
    with pytest.raises(UsageError, match=f"^'{text}' is not a switch: expected on or off$"):
        parse_switch(text)


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1e9", "1,5G", "5 iB", "5X", "1GG", "0x10", "1.G", "٣", "nan", "9" * 21]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size: expected a number with K, M, G or T, as in 64M or 1\.5GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "ms", "-1", "3h", "1e3", "300ms/s", "soon"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a time: expected a number with ms, s or m, as in 300ms or 0\.3s"):
        parse_milliseconds(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes_are_written_with_one_decimal(count: int, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(("milliseconds", "text"), [(0, "0 ms"), (35, "35 ms"), (999.7, "1.00 s"), (2500, "2.50 s")])
def test_times_are_written_in_ms_or_s(milliseconds: float, text: str) -> None:
    assert format_milliseconds(milliseconds) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (350, "350 ms"),
        (4_200, "4.2 s"),
        (9_960, "10 s"),
        (36_900, "37 s"),
        (200_000, "3 min 20 s"),
        (3_600_000, "1 h 0 min"),
        (7_500_000, "2 h 5 min"),
    ],
)
def test_durations_get_coarser_as_they_get_longer(milliseconds: float, text: str) -> None:
    assert format_duration(milliseconds) == text


@given(st.integers(0, 2**63))
def test_a_size_that_is_written_reads_back_to_within_its_last_digit(count: int) -> None:
    read = parse_size(format_size(count))
    assert abs(read - count) <= 0.06 * max(1024, count)


@pytest.mark.parametrize("parse", [parse_size, parse_milliseconds, parse_seconds])
@given(text=st.text())
def test_any_text_is_a_quantity_or_a_usage_error(parse: Callable[[str], int], text: str) -> None:
    try:
        assert parse(text) >= 0
    except UsageError as error:
        assert str(error).startswith(one_line(f"'{text}' is no"))
