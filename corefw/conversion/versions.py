"""Parses versions of QEMU and machine types as users write them. What each version does is in corefw.wire.versions."""

from __future__ import annotations

import re
from typing import Final

from corefw.errors import UsageError
from corefw.wire.versions import Version

_VERSION: Final = re.compile(r"(\d{1,3})\.(\d{1,3})(?:\.\d{1,3})?\Z")
_MACHINE_TYPE: Final = re.compile(r"(?P<board>.+)-(?P<version>\d{1,3}\.\d{1,3})\Z")


def parse_version(text: str) -> Version:
    """ "7.2" or "7.2.19". Raises UsageError."""
    found = _VERSION.match(text)
    if found is None:
        raise UsageError(f"'{text}' is not a QEMU version: expected for example 7.2 or 10.0")
    return Version(int(found[1]), int(found[2]))


def board(machine_type: str) -> str:
    """The type without its version: "pc-i440fx"."""
    found = _MACHINE_TYPE.match(machine_type)
    return machine_type if found is None else found["board"]
