"""The cases of the matrix: a fault at a point of a migration, over a transport."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tests.matrix.points import POINTS, Point
from tests.matrix.proxy import Cut


class Blow(StrEnum):
    """What happens to a process."""

    KILL_SOURCE = "kill -9 of the source"
    KILL_DESTINATION = "kill -9 of the destination"
    STOP_SOURCE = "SIGSTOP of the source"
    STOP_DESTINATION = "SIGSTOP of the destination"


Fault = Cut | Blow
FAULTS: Final[tuple[Fault, ...]] = (*Cut, *Blow)
SILENT: Final = frozenset({Cut.LOSE_FORWARD, Cut.LOSE_BACKWARD, Blow.STOP_SOURCE, Blow.STOP_DESTINATION})
"""Only a limit on silence ends them."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    transport: str
    point: Point
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.transport}: {self.point.stage}: {self.point.name}: {self.fault}"


def _cases() -> Iterator[Case]:
    for transport in ("tcp", "unix"):
        for point in POINTS:
            for fault in FAULTS:
                yield Case(transport, point, fault)


CASES: Final = tuple(_cases())
