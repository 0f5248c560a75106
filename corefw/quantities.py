"""Parses and formats sizes, rates, times and switches: "1G", "32MiB", "300ms", "on".

Units of bytes are powers of 1024, as in QEMU. A number without a unit means bytes, milliseconds or seconds. Anything
else raises UsageError with an example of what is expected.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Final

from corefw.errors import UsageError

_BYTES: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_MILLISECONDS: Final = {
    "": Decimal(1),
    "us": Decimal("0.001"),
    "ms": Decimal(1),
    "s": Decimal(1000),
    "m": Decimal(60000),
}
_SWITCH: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
_NUMBER: Final = r"([0-9]{1,20}(?:\.[0-9]{1,9})?)\s*"
_SIZE: Final = re.compile(_NUMBER + r"([kmgtpe]?)(?:(?<=[a-z])ib|b)?(?:/s)?", re.IGNORECASE)
_TIME: Final = re.compile(_NUMBER + r"(us|ms|s|m)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """ "4096", "64K", "1.5GiB", "100MB/s" -> bytes (per second), rounded down."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is not a size: expected a number with K, M, G or T, as in 64M or 1.5GiB")
    return int(Decimal(match[1]) * _BYTES[match[2].lower()])


def parse_milliseconds(text: str) -> int:
    """ "300", "300ms", "0.3s", "2m" -> milliseconds, rounded down."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is not a time: expected a number with ms, s or m, as in 300ms or 0.3s")
    return int(Decimal(match[1]) * _MILLISECONDS[(match[2] or "").lower()])


def parse_seconds(text: str) -> int:
    """ "10", "10s", "2m", "1500ms" -> seconds, rounded up: what is not zero does not become zero."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is not a time: expected a number with s or m, as in 10s or 2m")
    return math.ceil(Decimal(match[1]) * _MILLISECONDS[(match[2] or "s").lower()] / 1000)


def parse_switch(text: str) -> bool:
    """ "on", "yes", "true", and their opposites. 1 and 0 are numbers."""
    state = _SWITCH.get(text.strip().lower())
    if state is None:
        raise UsageError(f"'{text}' is not a switch: expected on or off")
    return state


def format_size(count: float) -> str:
    """1610612736 -> "1.5 GiB"."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1023.95:  # a value that rounds to 1024.0 is shown as 1.0 of the next unit
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def format_milliseconds(milliseconds: float) -> str:
    """35 -> "35 ms", 2500 -> "2.50 s"."""
    return f"{milliseconds:.0f} ms" if milliseconds < 999.5 else f"{milliseconds / 1000:.2f} s"


def format_duration(milliseconds: float) -> str:
    """Format a duration in seconds for people: "350 ms", "4.2 s", "37 s", "3 min 20 s", "2 h 5 min"."""
    if milliseconds < 999.5:
        return f"{milliseconds:.0f} ms"
    if milliseconds < 9_950:
        return f"{milliseconds / 1000:.1f} s"
    seconds = round(milliseconds / 1000)
    if seconds < 120:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{seconds // 60} min {seconds % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
