"""What QEMU's versions do differently in a migration, each difference once, with its version.

A difference depends on the program (what a QEMU of that version understands) or on the machine type (what it does for a
guest whose type names a version, so that older QEMUs can take the guest in). The stream names the machine type alone,
so code that reads a stream asks `holds()` with that version. docs/qemu-versions.md lists the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

Version = tuple[int, int]


class Depends(StrEnum):
    """What a difference depends on."""

    PROGRAM = "program"
    MACHINE_TYPE = "machine type"


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference: it holds from version `since` to version `until`, both included; None: no bound.

    what     what QEMU does
    migfw    what migfw does about it
    """

    name: str
    depends: Depends
    since: Version | None
    until: Version | None
    what: str
    migfw: str

    def holds(self, version: Version) -> bool:
        return (self.since is None or self.since <= version) and (self.until is None or version <= self.until)

    def versions(self) -> str:
        """The range in words."""
        if self.since is None:
            return "all" if self.until is None else f"up to {_text(self.until)}"
        return f"{_text(self.since)} and later" if self.until is None else f"{_text(self.since)} to {_text(self.until)}"


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def machine_version(name: str) -> Version | None:
    """The version that a machine type's name ends with, as in "pc-q35-10.0"; None for types that name none (microvm)
    and for a distribution's own ("pc-q35-rhel9.4.0")."""
    found = re.fullmatch(r"[a-z0-9-]+-(\d+)\.(\d+)", name)
    return None if found is None else (int(found[1]), int(found[2]))


SWITCHOVER_START: Final = Difference(
    "SWITCHOVER_START",
    Depends.MACHINE_TYPE,
    (10, 0),
    None,
    "The source sends command 11 when the guest has stopped, before the END sections. QEMU 9.2 and older fail on it.",
    "Takes it in. A parked machine sends it on where it came, and nowhere else.",
)
SWITCHOVER_ACK: Final = Difference(
    "SWITCHOVER_ACK",
    Depends.PROGRAM,
    (8, 1),
    None,
    "With the capability `switchover-ack` the source goes on sending until return-path message 7 has come. QEMU 8.0 and"
    " older fail on the message.",
    "Has the capability on both sides. A destination sends the message without it too where the machine type says that"
    " the source understands it.",
)
UNASKED_ACK: Final = Difference(
    "SWITCHOVER_ACK without a request",
    Depends.MACHINE_TYPE,
    None,
    (11, 0),
    "The destination decides which devices need `switchover-ack`; if none does, it sends one SWITCHOVER_ACK as soon as"
    " there is a return path. From 11.1 on the source's devices ask for it, and one that none asked for is an error.",
    "Follows the machine type on both sides: from 11.1 on none is sent and none awaited, since no device here asks.",
)

DIFFERENCES: Final = (SWITCHOVER_START, SWITCHOVER_ACK, UNASKED_ACK)
