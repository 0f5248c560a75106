"""The cases of the matrix: a fault at a point of a migration, over a transport."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tests.helpers.cutting import Cut
from tests.matrix.points import BYTES, MESSAGES, PAUSED, REQUESTED, STATUSES, Point


class Blow(StrEnum):
    """A fault of a process."""

    KILL_SOURCE = "kill -9 of the source"
    KILL_DESTINATION = "kill -9 of the destination"
    STOP_SOURCE = "SIGSTOP of the source"
    STOP_DESTINATION = "SIGSTOP of the destination"


Fault = Cut | Blow
FAULTS: Final[tuple[Fault, ...]] = (*Cut, *Blow)
SILENT: Final = frozenset({Cut.LOSE_FORWARD, Cut.LOSE_BACKWARD, Blow.STOP_SOURCE, Blow.STOP_DESTINATION})
"""Faults that only a limit on silence reveals."""


@dataclass(frozen=True, slots=True)
class Way:
    """How the two sides reach each other. Every fault comes at each of the points.

    preempt   requested pages have a channel of their own
    """

    transport: str
    points: tuple[Point, ...]
    preempt: bool = False

    @property
    def name(self) -> str:
        return f"{self.transport}, preempt" if self.preempt else self.transport


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the matrix."""

    way: Way
    point: Point
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.way.name}: {self.point.stage}: {self.point.name}: {self.fault}"


WAYS: Final = (
    Way("tcp", (*MESSAGES, *STATUSES)),
    Way("unix", (*MESSAGES, *STATUSES)),
    Way("zmq", (*BYTES, *STATUSES)),
    Way("ssh", (*BYTES, *STATUSES)),
    Way("tcp", REQUESTED, preempt=True),
    Way("unix", REQUESTED, preempt=True),
)


def _cases() -> Iterator[Case]:
    for way in WAYS:
        for point in way.points:
            for fault in FAULTS:
                if (way.transport, fault) != ("unix", Cut.RESET):  # a UNIX socket has no RST
                    yield Case(way, point, fault)
        if not way.preempt:  # a paused migration has no channels
            for blow in Blow:
                yield Case(way, PAUSED, blow)


CASES: Final = tuple(_cases())

_ALWAYS: Final = frozenset(
    {
        ("tcp", "PART", Cut.RESET),
        ("unix", "EOF", Blow.KILL_DESTINATION),
        ("tcp", "SHUT 0", Cut.END),
        ("unix", "PACKAGED, half of it", Cut.HALF_FORWARD),
        ("tcp", "PONG 3", Blow.KILL_DESTINATION),
        ("tcp", "REQ_PAGES", Cut.LOSE_BACKWARD),
        ("tcp", "REQ_PAGES", Blow.STOP_DESTINATION),
        ("unix", "RECV_BITMAP (answer)", Cut.END),
        ("tcp", "RESUME", Blow.KILL_SOURCE),
        ("tcp", "RESUME_ACK", Cut.HALF_BACKWARD),
        ("zmq", "status postcopy-active", Cut.RESET),
        ("ssh", "status postcopy-active", Cut.RESET),
        ("ssh", "status pre-switchover", Blow.KILL_DESTINATION),
        ("unix, preempt", "status postcopy-active", Cut.HALF_FORWARD),
    }
)

SUBSET: Final = tuple(case for case in CASES if (case.way.name, case.point.name, case.fault) in _ALWAYS)
"""The cases that `make test` runs."""
