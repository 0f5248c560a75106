"""Which version of QEMU knows which part of the stream's frame.

Source: hw_compat_* in hw/core/machine.c and the commits that added each part, as of QEMU 10.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from corefw.errors import UsageError
from corefw.wire.constants import Command, RamFlag


class Version(NamedTuple):
    """A release of QEMU."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


COMMANDS_SINCE: Final[Mapping[Command, Version]] = {
    Command.SWITCHOVER_START: Version(10, 0),
}
"""The first version that knows a command; all others know those that are not here."""

RAM_RECORDS_SINCE: Final[Mapping[RamFlag, Version]] = {
    RamFlag.MULTIFD_FLUSH: Version(8, 1),
}

RAM_RECORDS_UNTIL: Final[Mapping[RamFlag, Version]] = {
    RamFlag.COMPRESS_PAGE: Version(9, 1),
}
"""The first version that does not know a kind of record any more."""

SUBSECTIONS_SINCE: Final[Mapping[str, Version]] = {
    "configuration/target-page-bits": Version(2, 9),
    "configuration/capabilities": Version(4, 0),
    "configuration/uuid": Version(4, 2),
}

_VERSION: Final = re.compile(r"(\d{1,3})\.(\d{1,3})(?:\.\d{1,3})?\Z")
_MACHINE_TYPE: Final = re.compile(r"(?P<board>.+)-(?P<version>\d{1,3}\.\d{1,3})\Z")


def parse_version(text: str) -> Version:
    """ "7.2" or "7.2.19". Raises UsageError."""
    found = _VERSION.match(text)
    if found is None:
        raise UsageError(f"'{text}' is no version of QEMU: expected one as 7.2 or 10.0")
    return Version(int(found[1]), int(found[2]))


def machine_version(machine_type: str) -> Version | None:
    """The version at the end of a type as "pc-i440fx-7.2"; None for one without."""
    found = _MACHINE_TYPE.match(machine_type)
    return None if found is None else parse_version(found["version"])


def board(machine_type: str) -> str:
    """The type without its version: "pc-i440fx"."""
    found = _MACHINE_TYPE.match(machine_type)
    return machine_type if found is None else found["board"]
