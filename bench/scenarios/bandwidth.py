"""Does the source keep to max-bandwidth?"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.engines import BenchError, Guest, Process, Side
from bench.results import Chart, Outcome, Row, Shape, at_most
from bench.sampling import Pairs
from bench.setting import Bench, Effort
from bench.warming import GIB

NAME: Final = "bandwidth"
LIMIT: Final = 5.0
"""Percent, over any second."""
SECOND: Final = 1.0
PHASES: Final = ((100_000_000, 3.0), (20_000_000, 3.0), (100_000_000, 3.0))
"""max-bandwidth in bytes a second, and for how many seconds; all but the first are changes in flight."""
CHUNK: Final = 1 << 18
END_SECONDS: Final = 10.0
TIMES: Final = {Effort.QUICK: 1, Effort.USUAL: 1, Effort.FULL: 3}
"""Number of runs. Their median counts, because the machine itself may stall. The worst is shown too."""


@dataclass(slots=True)
class Sink:
    """A receiver that records when bytes arrive, and how many. `times` (of time.monotonic) and `counts` correspond."""

    listener: socket.socket
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def receive(self) -> None:
        """Receive until the sender ends. Runs in a thread of its own."""
        buffer = bytearray(CHUNK)
        with contextlib.suppress(OSError):
            connection, _ = self.listener.accept()
            with connection:
                while count := connection.recv_into(buffer):
                    self.times.append(time.monotonic())
                    self.counts.append(count)


@dataclass(frozen=True, slots=True)
class Found:
    """The worst deviation from the limit over any second, in percent, for each phase; and the rate's curve."""

    worst: Sequence[float]
    curve: Sequence[tuple[float, float]]

    @property
    def worst_of_all(self) -> float:
        return max(self.worst)

    def document(self) -> dict[str, Any]:
        return {"worst deviation, percent": list(self.worst)}


def measure(bench: Bench) -> Outcome:
    guest = Guest(GIB)
    runs = min(TIMES[bench.effort], bench.pairs)
    found = bench.compare(lambda side: _measure(side, guest), _describe, times=runs)
    rows = [
        Row(
            f"worst second at {rate // 10**6} MB/s{', changed in flight' if number else ''}",
            "% off",
            *found.median(partial(_worst_second, number)),
            at_most(LIMIT),
        )
        for number, (rate, _) in enumerate(PHASES)
    ]
    rows.append(_worst_run(found))
    return Outcome(
        NAME,
        "max-bandwidth over any second",
        "A receiver on loopback notes when each piece arrives; the limit is changed in flight. The figure is the"
        " largest deviation from the limit over any window of one second that lies within one phase; runs: {runs}, of"
        " which the median counts, since a machine may stand still for a moment. The worst has a row of its own.",
        rows,
        [
            Chart(
                "Rate over the second before, in the median run",
                "seconds",
                "MB/s",
                {"migfw": _middle(found.ours).curve} | ({"QEMU": _middle(found.qemu).curve} if found.qemu else {}),
                Shape.LINE,
                {f"{rate // 10**6} MB/s": rate / 1e6 for rate, _ in PHASES},
            )
        ],
        bench.notes(),
        {"migfw": [one.document() for one in found.ours], "QEMU": [one.document() for one in found.qemu]},
    )


def _worst_run(found: Pairs[Found]) -> Row:
    """The worst run, which the medians hide. It has no goal, because the machine may have stalled."""
    theirs = max((one.worst_of_all for one in found.qemu), default=None)
    return Row("worst second of the worst run", "% off", max(one.worst_of_all for one in found.ours), theirs)


def _middle(runs: Sequence[Found]) -> Found:
    """The median run; of two in the middle the better one."""
    return sorted(runs, key=lambda one: one.worst_of_all)[(len(runs) - 1) // 2]


def _worst_second(phase: int, found: Found) -> float:
    return found.worst[phase]


def _describe(found: Found) -> str:
    return ", ".join(f"{worst:.1f} %" for worst in found.worst) + " off"


def _measure(side: Side, guest: Guest) -> Found:
    with side.source(guest) as source, _listening() as (sink, uri):
        bounds = _send(source, uri)
    times, sums = np.array(sink.times), np.cumsum([0, *sink.counts])
    starts = [max(bounds[0], sink.times[0]), *bounds[1:-1]]
    worst = [
        _worst(times, sums, start, end, rate) for start, end, (rate, _) in zip(starts, bounds[1:], PHASES, strict=True)
    ]
    return Found(worst, _curve(times, sums))


@contextlib.contextmanager
def _listening() -> Iterator[tuple[Sink, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sink = Sink(listener)
        thread = threading.Thread(target=sink.receive, name="sink", daemon=True)
        thread.start()
        yield sink, f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        thread.join(END_SECONDS)


def _send(source: Process, uri: str) -> list[float]:
    """Begin a migration, go through the phases, cancel it; the phases' bounds (of time.monotonic)."""
    off = [{"capability": "return-path", "state": False}]
    source.call("migrate-set-capabilities", capabilities=off)
    source.call("migrate-set-parameters", max_bandwidth=PHASES[0][0])
    source.call("migrate", uri=uri)
    bounds = [time.monotonic()]
    time.sleep(PHASES[0][1])
    for rate, seconds in PHASES[1:]:
        source.call("migrate-set-parameters", max_bandwidth=rate)
        bounds.append(time.monotonic())
        time.sleep(seconds)
    bounds.append(time.monotonic())
    source.call("migrate_cancel")
    return bounds


def _worst(times: NDArray[np.float64], sums: NDArray[np.int64], start: float, end: float, rate: int) -> float:
    """Percent. Most bytes are in a window that begins with an arrival, fewest in one that begins just after it."""
    begins = times[(times >= start) & (times + SECOND <= end)]
    if not len(begins):
        raise BenchError("nothing arrived for a second: is the machine too busy?")
    most = sums[np.searchsorted(times, begins + SECOND, "right")] - sums[np.searchsorted(times, begins, "left")]
    least = sums[np.searchsorted(times, begins + SECOND, "left")] - sums[np.searchsorted(times, begins, "right")]
    return float(max(most.max() / rate - 1, 1 - least.min() / rate) * 100)


def _curve(times: NDArray[np.float64], sums: NDArray[np.int64]) -> list[tuple[float, float]]:
    """(seconds since the first arrival, MB/s over the second before), ten a second."""
    ends = np.arange(times[0] + SECOND, times[-1], 0.1)
    counts = sums[np.searchsorted(times, ends, "right")] - sums[np.searchsorted(times, ends - SECOND, "right")]
    return [(float(end - times[0]), float(count) / 1e6 / SECOND) for end, count in zip(ends, counts, strict=True)]
