"""Sizes, rates and times as people write them: "1G", "32MiB", "300ms".

The law: units of bytes are powers of 1024, as QEMU's are; a number alone is bytes, or milliseconds. Anything else is a
UsageError that shows what would have been right.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from corefw.errors import UsageError

_BYTES: Final = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}
_MILLISECONDS: Final = {
    "": Decimal(1),
    "MS": Decimal(1),
    "US": Decimal("0.001"),
    "S": Decimal(1000),
    "M": Decimal(60000),
}
_NUMBER: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)\Z")


def parse_size(text: str) -> int:
    """ "4096", "64K", "1.5GiB", "100MB/s" -> bytes (per second)."""
    match = _NUMBER.match(text.strip().removesuffix("/s"))
    unit = match[2].upper().removesuffix("IB") if match else ""
    unit = unit.removesuffix("B") if len(unit) > 1 else unit
    if match is None or unit not in _BYTES:
        raise UsageError(f"'{text}' is no size: expected a number with K, M, G or T, as in 64M or 1.5GiB")
    return int(Decimal(match[1]) * _BYTES[unit])


def parse_milliseconds(text: str) -> int:
    """ "300", "300ms", "0.3s" -> milliseconds."""
    match = _NUMBER.match(text.strip())
    if match is None or match[2].upper() not in _MILLISECONDS:
        raise UsageError(f"'{text}' is no time: expected a number with ms, s or m, as in 300ms or 0.3s")
    return int(Decimal(match[1]) * _MILLISECONDS[match[2].upper()])


def format_size(count: float) -> str:
    """1610612736 -> "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_milliseconds(milliseconds: float) -> str:
    """35 -> "35 ms", 2500 -> "2.50 s"."""
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"
