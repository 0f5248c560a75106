"""Differences between versions of QEMU in a migration: a table with one row for each.

A difference depends on the program (what a QEMU of that version understands) or on the machine type (what a QEMU does
for a guest whose type names a version, so that older QEMUs can receive it). The stream names only the machine type, so
code that reads a stream asks `holds()` with that version. docs/qemu-versions.md shows the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple

from corefw.wire.constants import Command, RamFlag, ReturnMessage


class Version(NamedTuple):
    """A release of QEMU."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class Depends(StrEnum):
    """Whether a difference depends on the program or on the machine type."""

    PROGRAM = "program"
    MACHINE_TYPE = "machine type"


Subject = Command | RamFlag | ReturnMessage | str
"""The subject of a difference. A string names a configuration subsection, a section or a capability."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference, which holds from version `since` to version `until`, both included; None: no bound.

    what     what QEMU does in these versions
    migfw    what migfw does about it
    """

    name: str
    subject: Subject
    depends: Depends
    since: Version | None
    until: Version | None
    what: str
    migfw: str

    def holds(self, version: Version) -> bool:
        return (self.since is None or self.since <= version) and (self.until is None or version <= self.until)

    def versions(self) -> str:
        """The range of versions in words."""
        if self.since is None:
            return f"up to {self.until}"
        return f"{self.since} and later" if self.until is None else f"{self.since} to {self.until}"


def machine_version(machine_type: str) -> Version | None:
    """The version that a machine type's name ends with, as in "pc-q35-10.0"; None for types that name none (microvm)
    and for a distribution's own ("pc-q35-rhel9.4.0")."""
    found = re.fullmatch(r".+-(\d{1,3})\.(\d{1,3})", machine_type)
    return None if found is None else Version(int(found[1]), int(found[2]))


@lru_cache(maxsize=None, typed=True)  # numbers of different enumerations are equal
def is_known(subject: Subject, version: Version) -> bool:
    """Whether a QEMU of that version understands this part of a stream."""
    return all(
        one.holds(version) for one in DIFFERENCES if one.subject == subject and type(one.subject) is type(subject)
    )


SWITCHOVER_START: Final = Difference(
    "SWITCHOVER_START",
    Command.SWITCHOVER_START,
    Depends.MACHINE_TYPE,
    Version(10, 0),
    None,
    "The source sends command 11 when the guest has stopped, before the END sections. QEMU 9.2 and older fail on it.",
    "Accepts it. A parked machine sends it on if it arrived with it, and only then; `convert` removes it.",
)
SWITCHOVER_ACK: Final = Difference(
    "SWITCHOVER_ACK",
    ReturnMessage.SWITCHOVER_ACK,
    Depends.PROGRAM,
    Version(8, 1),
    None,
    "With the capability `switchover-ack` the source keeps sending until return-path message 7 has come. QEMU 8.0 and"
    " older fail on the message.",
    "Supports the capability on both sides. A parked machine sends the message without it too if the machine type says"
    " that the source understands it, or if the source evidently waits for it.",
)
UNASKED_ACK: Final = Difference(
    "SWITCHOVER_ACK without a request",
    "switchover-ack-legacy",
    Depends.MACHINE_TYPE,
    None,
    Version(11, 0),
    "The destination decides which devices need `switchover-ack`; if none does, it sends one SWITCHOVER_ACK as soon as"
    " there is a return path. From 11.1 on, the source's devices request it, and an unrequested one is an error.",
    "Sends none for machine types from 11.1 on, and for those without a version only if the source waits for it.",
)

DIFFERENCES: Final = (
    SWITCHOVER_START,
    SWITCHOVER_ACK,
    UNASKED_ACK,
    Difference(
        "MULTIFD_FLUSH",
        RamFlag.MULTIFD_FLUSH,
        Depends.MACHINE_TYPE,
        Version(8, 1),
        None,
        "A RAM record in the stream marks where the multifd channels have to synchronize; older types synchronize at"
        " the end of every section.",
        "Refused, naming the capability `multifd`; `inspect` reads it, `convert` removes it.",
    ),
    Difference(
        "COMPRESS_PAGE",
        RamFlag.COMPRESS_PAGE,
        Depends.PROGRAM,
        None,
        Version(9, 0),
        "The capability `compress` sends pages compressed with zlib. QEMU 9.1 removed it.",
        "Refused, naming the capability; `inspect` reads the pages, `convert` decompresses them.",
    ),
    Difference(
        "section block",
        "block",
        Depends.PROGRAM,
        None,
        Version(9, 0),
        "The capability `block` sends disks in the stream. QEMU 9.1 removed it.",
        "Refused, naming the capability.",
    ),
    Difference(
        "configuration/target-page-bits",
        "configuration/target-page-bits",
        Depends.PROGRAM,
        Version(2, 9),
        None,
        "Targets whose page size varies (Arm) send it in the configuration section.",
        "A parked machine sends it on; pages of another size than 4 KiB are refused.",
    ),
    Difference(
        "configuration/capabilities",
        "configuration/capabilities",
        Depends.PROGRAM,
        Version(4, 0),
        None,
        "The configuration section names the capabilities `x-ignore-shared` and `mapped-ram` (9.0) if they are on.",
        "`x-ignore-shared` is refused by name, `mapped-ram` is read.",
    ),
    Difference(
        "configuration/uuid",
        "configuration/uuid",
        Depends.PROGRAM,
        Version(4, 2),
        None,
        "With the capability `validate-uuid` the configuration section has the guest's UUID.",
        "A parked machine sends it on.",
    ),
    Difference(
        "background-snapshot",
        "background-snapshot",
        Depends.PROGRAM,
        Version(6, 0),
        None,
        "A stream of the capability `background-snapshot` has no END section for the RAM.",
        "Parks the machine, and sends it on as an ordinary stream.",
    ),
    Difference(
        "PING 66 in the package of a postcopy",
        "package-ping",
        Depends.PROGRAM,
        Version(10, 2),
        None,
        "Behind the devices a second PING asks whether they are loaded; until its PONG has come, the status of the"
        " source is `postcopy-device`, and the source takes its guest back if the connection breaks.",
        "Answers every PING. A parked machine keeps none of them; a package that it sends has PING 3 alone.",
    ),
    Difference(
        "bitmaps of several nodes in postcopy",
        "bitmaps-of-several-nodes",
        Depends.PROGRAM,
        Version(7, 2),
        Version(10, 0),
        "A destination aborts when bits of another node's bitmap come after the guest's start.",
        "Sends the bitmaps of a parked machine before the switch.",
    ),
    Difference(
        "devices before the RAM",
        "virtio-mem-device-early",
        Depends.MACHINE_TYPE,
        Version(8, 0),
        None,
        "virtio-mem sends a part of its state before the RAM: after the RAM's START in 10.0, before it in 11.1.",
        "Refused, naming the device. With the device's property `x-early-migration=off`, the state is sent after the"
        " RAM.",
    ),
    Difference(
        "COLO without ENABLE_COLO",
        "x-colo",
        Depends.PROGRAM,
        Version(11, 1),
        None,
        "A source with the capability `x-colo` no longer says so in the stream; until 10.0 it sends ENABLE_COLO.",
        "Refuses ENABLE_COLO, naming the capability. A newer stream is parked like any other, and the source stays in"
        " status `colo`, stopped, until `x-colo-lost-heartbeat`.",
    ),
)
