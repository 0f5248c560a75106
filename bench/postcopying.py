"""One migration that switches to postcopy at once, over tcp loopback between two fresh processes, and its figures.

`migrate-start-postcopy` follows `migrate` at once, so nearly all RAM is sent while the guest already runs on the
destination, without a bandwidth limit. Meanwhile the guest touches its pages in a scattered order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.engines import BenchError, Guest, Process, Side
from bench.migrating import follow, forget_events, ready

SETTLED: Final = 1.2
"""Seconds that the guest runs before the migration: QEMU's guest calibrates the processor's clock in that time."""


@dataclass(frozen=True, slots=True)
class Postcopy:
    """Times in seconds.

    blackout      from the source's event STOP to the destination's RESUME
    remaining     from that STOP to the destination's event "completed"
    downtime      as the source reports it
    destination_cpu   processor time of the destination's engine, without its guest
    touches       rows (when, how long): the guest's touches on the destination that waited, from the first of them on
    reported      counts of page faults by latency, as the destination reports them: postcopy-latency-dist
    """

    blackout: float
    remaining: float
    downtime: float
    destination_cpu: float
    touches: NDArray[np.float64]
    reported: Sequence[int]

    def latency(self, percent: float) -> float:
        """Percentile of how long touches waited, in seconds; 0 if none did."""
        return float(np.percentile(self.touches[:, 1], percent)) if len(self.touches) else 0.0

    def document(self) -> dict[str, Any]:
        return {
            "blackout": self.blackout,
            "remaining": self.remaining,
            "downtime": self.downtime,
            "destination_cpu": self.destination_cpu,
            "touches": self.touches.tolist(),
            "postcopy-latency-dist": list(self.reported),
        }


def move_in_postcopy(side: Side, guest: Guest) -> Postcopy:
    """Raises BenchError when it does not complete."""
    with ready(side, guest) as (source, destination, uri):
        time.sleep(SETTLED)
        before = side.processor_seconds(destination)
        for process in (source, destination):
            forget_events(process)
        source.call("migrate", uri=uri)
        source.call("migrate-start-postcopy")
        left = follow(source)
        arrived = follow(destination)
        used = side.processor_seconds(destination) - before
        destination.call("stop")
        answer = _completed(source)
        touches = side.slow_touches(source, destination)
        if len(touches):
            touches[:, 0] -= touches[0, 0]
        return Postcopy(
            blackout=arrived["RESUME"] - left["STOP"],
            remaining=arrived["MIGRATION"] - left["STOP"],
            downtime=answer["downtime"] / 1000,
            destination_cpu=used,
            touches=touches,
            reported=_completed(destination).get("postcopy-latency-dist", ()),
        )


def _completed(process: Process) -> dict[str, Any]:
    answer: dict[str, Any] = process.call("query-migrate")
    if answer["status"] != "completed":
        raise BenchError(f"the migration did not complete: {answer.get('error-desc', answer['status'])}")
    return answer
