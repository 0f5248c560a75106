"""One migration over tcp loopback between two fresh processes, and its figures.

Nothing is queried while it runs: events tell when it is over, and the engines' own figures are read afterwards.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench.engines import BenchError, Guest, Process, Side
from bench.sampling import processor_seconds
from bench.warming import GIB, warm

END_SECONDS: Final = 300.0
ENDED: Final = frozenset({"completed", "failed", "cancelled"})
EXTRA: Final = 3 * GIB
"""Bytes to warm beyond what the destination needs, because the host keeps taking free memory back."""


@dataclass(frozen=True, slots=True)
class Migration:
    """Times in seconds.

    wall          from the command `migrate` to the event that says "completed", as a client of the source sees it
    total, setup, downtime   as the source reports them
    blackout      from the source's event STOP to the destination's RESUME; None for a paused guest
    ram           bytes of pages that were sent, without the zero ones
    source_cpu, destination_cpu   processor time that the engine used, including QEMU's emulated guest
    """

    wall: float
    total: float
    setup: float
    downtime: float
    blackout: float | None
    ram: int
    passes: int
    source_cpu: float
    destination_cpu: float

    @property
    def throughput(self) -> float:
        """Bytes a second, by the engine's own figures."""
        return self.ram / max(self.total, 0.001)

    @property
    def wall_throughput(self) -> float:
        return self.ram / self.wall

    @property
    def seconds_per_gib(self) -> float:
        return self.wall / (self.ram / GIB)

    def document(self) -> dict[str, Any]:
        return asdict(self)


@contextlib.contextmanager
def ready(side: Side, guest: Guest) -> Iterator[tuple[Process, Process, str]]:
    """A source with its guest as it is to be measured, a destination with its RAM allocated, and the URI to dial."""
    with side.source(guest) as source:
        warm(guest.ram + EXTRA)
        with side.destination(guest) as (destination, uri):
            yield source, destination, uri


def migrate(side: Side, guest: Guest) -> Migration:
    """Raises BenchError when it does not complete."""
    with ready(side, guest) as (source, destination, uri):
        return migrate_between(source, destination, uri)


def migrate_between(source: Process, destination: Process, uri: str) -> Migration:
    """Do what migrate() does, between engines that exist already."""
    both = (source, destination)
    before = [processor_seconds(process.pid) for process in both]
    for process in both:
        forget_events(process)
    began = time.monotonic()
    source.call("migrate", uri=uri)
    left = follow(source)
    wall = time.monotonic() - began
    arrived = follow(destination)
    used = [processor_seconds(process.pid) - then for process, then in zip(both, before, strict=True)]
    answer = source.call("query-migrate")
    if answer["status"] != "completed":
        raise BenchError(f"the migration did not complete: {answer.get('error-desc', answer['status'])}")
    return Migration(
        wall=wall,
        total=answer["total-time"] / 1000,
        setup=answer["setup-time"] / 1000,
        downtime=answer["downtime"] / 1000,
        blackout=arrived["RESUME"] - left["STOP"] if "STOP" in left and "RESUME" in arrived else None,
        ram=answer["ram"]["normal-bytes"],
        passes=answer["ram"]["dirty-sync-count"],
        source_cpu=used[0],
        destination_cpu=used[1],
    )


def forget_events(process: Process) -> None:
    while process.client.wait_event(0) is not None:
        pass


def follow(process: Process) -> dict[str, float]:
    """Wait for the end of the migration: the events and when they happened, in seconds since 1970."""
    seen: dict[str, float] = {}
    for event in process.client.events(END_SECONDS):
        seen[event.name] = event.timestamp
        if event.name == "MIGRATION" and event.data["status"] in ENDED:
            return seen
    raise BenchError(f"the migration did not end within {END_SECONDS:.0f} s")
