"""The journal of one guest, and the table that says how it travels.

The table alone drives load, save and the description. Text is sent as bytes, after a field with their number; every
number that comes from the stream has a limit.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from corefw.wire.vmstate import Buffer, Kind, Refused, Scalar, StructArray, VMState

if TYPE_CHECKING:
    from corefw.machine import Machine

MOST_HOPS: Final = 1000
MOST_BYTES: Final = 255


@dataclass
class Hop:
    """A host that the guest has lived on, and since when, in seconds since 1970."""

    name: bytes = b""
    since: int = 0
    length: int = 0

    @property
    def host(self) -> str:
        return self.name.decode()


@dataclass
class Journal:
    """The hosts, in the order in which the guest came to them."""

    hops: list[Hop] = field(default_factory=list)
    count: int = 0

    def arrive(self) -> None:
        """Record that the guest now lives here. Drops the oldest entries if there are too many."""
        here = socket.gethostname().encode()[:MOST_BYTES]
        self.hops = [*self.hops[-MOST_HOPS + 1 :], Hop(here, int(time.time()))]


def _measure_hop(hop: Hop) -> None:
    hop.length = len(hop.name)


def _measure_journal(journal: Journal) -> None:
    journal.count = len(journal.hops)


def _check_hop(hop: Hop, _version_id: int) -> None:
    """Refuse a name that is not UTF-8 while loading, where the error names the stream."""
    try:
        hop.name.decode()
    except UnicodeDecodeError:
        raise Refused("a host's name as text", repr(hop.name)) from None


HOP: Final = VMState(
    "hop",
    fields=(
        Scalar("length", Kind.U8),
        Buffer("name", "length", limit=MOST_BYTES),
        Scalar("since", Kind.U64),
    ),
    pre_save=_measure_hop,
    post_load=_check_hop,
)

JOURNAL: Final = VMState(
    "journal",
    version_id=1,
    fields=(
        Scalar("count", Kind.U16),
        StructArray("hops", "count", HOP, limit=MOST_HOPS, make=Hop),
    ),
    pre_save=_measure_journal,
)

_journals: WeakKeyDictionary[Machine, Journal] = WeakKeyDictionary()


def journal_of(machine: Machine) -> Journal:
    """The journal of this machine's guest; a new one says that the guest lives here. It ends with the machine."""
    journal = _journals.get(machine)
    if journal is None:
        journal = _journals[machine] = Journal()
        journal.arrive()
    return journal
