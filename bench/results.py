"""What a scenario found: rows of a table, charts, notes, and the samples behind them.

Invariant: there is no row for what was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Of(StrEnum):
    """Which figure a goal limits."""

    OURS = "ours"
    RATIO = "ratio"


class Bound(StrEnum):
    """Whether a goal's limit is a maximum or a minimum."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True)
class Goal:
    """`limit` in the row's unit, or of the ratio."""

    of: Of
    bound: Bound
    limit: float

    def met(self, ours: float, ratio: float | None) -> bool | None:
        """None: there is nothing to compare with."""
        value = ours if self.of is Of.OURS else ratio
        if value is None:
            return None
        return value <= self.limit if self.bound is Bound.AT_MOST else value >= self.limit


def at_most(limit: float) -> Goal:
    """Our figure is no more than this."""
    return Goal(Of.OURS, Bound.AT_MOST, limit)


def no_more_than_qemu() -> Goal:
    return at_most_qemu_times(1.0)


def at_most_qemu_times(factor: float) -> Goal:
    return Goal(Of.RATIO, Bound.AT_MOST, factor)


def at_least_qemu_times(factor: float) -> Goal:
    return Goal(Of.RATIO, Bound.AT_LEAST, factor)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `ours` and `qemu` are medians; `ratio` is the median of the pairs' ratios ours/QEMU."""

    what: str
    unit: str
    ours: float
    qemu: float | None = None
    ratio: float | None = None
    goal: Goal | None = None

    @property
    def met(self) -> bool | None:
        """None if there is no goal, or no QEMU to compare with."""
        return self.goal.met(self.ours, self.ratio) if self.goal else None


class Shape(StrEnum):
    """How a chart's points are drawn: DOTS for numbered runs, a LINE over time, a SCATTER of many points."""

    LINE = "line"
    DOTS = "dots"
    SCATTER = "scatter"


@dataclass(frozen=True, slots=True)
class Chart:
    """Series of (x, y). `limits` are horizontal lines: label -> y."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    shape: Shape = Shape.LINE
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a scenario found. `about` says how it was measured; `samples` are the data behind the rows."""

    name: str
    title: str
    about: str
    rows: Sequence[Row]
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    samples: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON has it; charts are made of samples and left out."""
        rows = [asdict(row) | {"met": row.met} for row in self.rows]
        return {
            "name": self.name,
            "title": self.title,
            "about": self.about,
            "rows": rows,
            "notes": list(self.notes),
            "samples": dict(self.samples),
        }
