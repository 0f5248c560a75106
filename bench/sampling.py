"""Turns, pairs and medians; processor time and memory of a process.

Runs alternate, A B A B ..., so that whatever else the machine does affects both; each pair gives one ratio, and the
median of the ratios is the result.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

T = TypeVar("T")

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Pairs(Generic[T]):
    """What both sides measured; `qemu` is empty where there is no QEMU."""

    ours: Sequence[T]
    qemu: Sequence[T]

    def median(self, figure: Callable[[T], float]) -> tuple[float, float | None, float | None]:
        """(ours, QEMU's, ours/QEMU): medians; the last one of the ratios."""
        ours = [figure(one) for one in self.ours]
        theirs = [figure(one) for one in self.qemu]
        if not theirs:
            return median(ours), None, None
        ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b]
        return median(ours), median(theirs), median(ratios) if ratios else None


def in_turns(count: int, ours: Callable[[], T], qemu: Callable[[], T] | None) -> Pairs[T]:
    """Ours, QEMU's, ours, QEMU's, ...: `count` pairs."""
    first: list[T] = []
    second: list[T] = []
    for _ in range(count):
        first.append(ours())
        if qemu is not None:
            second.append(qemu())
    return Pairs(first, second)


def median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def processor_seconds(pid: int, thread: int | None = None) -> float:
    """Processor time of a process, or of one of its threads, so far, in user and in kernel mode."""
    fields = (
        Path(f"/proc/{pid}/stat" if thread is None else f"/proc/{pid}/task/{thread}/stat")
        .read_text()
        .rpartition(")")[2]
        .split()
    )
    return (int(fields[11]) + int(fields[12])) / _TICKS


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process: its private memory. Guest RAM in a memfd is shared memory, and not included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "RssAnon":
            return int(rest.split()[0]) * 1024
    return 0  # it has ended, and waits to be reaped


@dataclass(slots=True)
class MemoryWatch:
    """Watch the anonymous memory of processes in a `with` block. `peaks` by pid; `history` in (seconds, bytes)."""

    pids: Sequence[int]
    period: float = 0.005
    history: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def peak(self, pid: int) -> int:
        return int(max(count for _, count in self.history[pid]))

    def __enter__(self) -> Self:
        self.history = {pid: [] for pid in self.pids}
        self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        began = time.monotonic()
        while True:
            for pid, seen in self.history.items():
                try:
                    seen.append((time.monotonic() - began, anonymous_bytes(pid)))
                except OSError:
                    return  # one of them has gone
            if self._ended.wait(self.period):
                return
