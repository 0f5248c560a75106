"""Charts as SVG text, for a page without scripts or other files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from bench.results import Chart, Shape

WIDTH: Final = 640
HEIGHT: Final = 300
LEFT: Final = 64
RIGHT: Final = 16
TOP: Final = 34
BOTTOM: Final = 44
"""Pixels; the last four are the margins around the points."""
COLOURS: Final = ("#1f6feb", "#d1571b", "#2da44e", "#8250df", "#bf8700")
TICKS: Final = 5

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values of [low, high] to pixels of [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, least: float = 0.0) -> Iterator[float]:
        """Round numbers, about TICKS of them, at least `least` apart."""
        step = max(least, _round_up((self.high - self.low) / TICKS))
        value = math.ceil(self.low / step) * step
        while value <= self.high + step / 1e6:
            yield value
            value += step


def draw(chart: Chart) -> str:
    """The chart as one <svg> element. The y axis begins at zero, so that lengths can be compared."""
    points = [point for series in chart.series.values() for point in series]
    if not points:
        return ""
    xs = [x for x, _ in points]
    highest = max([y for _, y in points] + list(chart.limits.values()))
    beside = 0.5 if chart.shape is Shape.DOTS or min(xs) == max(xs) else 0.0
    low, high = min(xs) - beside, max(xs) + beside
    across = _Scale(low, high, LEFT, WIDTH - RIGHT)
    up = _Scale(0.0, highest * 1.08 or 1.0, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        *_axes(chart, across, up),
        *(_limit(label, up(y)) for label, y in chart.limits.items()),
        *_series(chart, across, up),
        "</svg>",
    ]
    return "\n".join(parts)


def _axes(chart: Chart, across: _Scale, up: _Scale) -> Iterator[str]:
    for value in up.ticks():
        y = up(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    for value in across.ticks(1.0 if chart.shape is Shape.DOTS else 0.0):
        x = across(value)
        yield f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
    x, y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {y})"'
    yield f'<text class="axis" x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(chart.x)}</text>'
    yield f'<text class="axis" x="14" y="{y}" text-anchor="middle" {turned}>{escape(chart.y)}</text>'


def _limit(label: str, y: float) -> str:
    return (
        f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _series(chart: Chart, across: _Scale, up: _Scale) -> Iterator[str]:
    for number, (name, points) in enumerate(chart.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        pixels = [(across(x), up(y)) for x, y in points]
        if chart.shape is Shape.LINE:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        if chart.shape is Shape.SCATTER:
            yield from (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.5" fill="{colour}" fill-opacity="0.6"/>' for x, y in pixels
            )
        elif chart.shape is Shape.DOTS or len(pixels) < 10:
            yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in pixels)
        yield from _legend(number, name, colour, list(chart.series))


def _legend(number: int, name: str, colour: str, names: Sequence[str]) -> Iterator[str]:
    x = LEFT + sum(28 + 7 * len(before) for before in names[:number])
    yield f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>'
    yield f'<text class="axis" x="{x + 16}" y="20">{escape(name)}</text>'


def _round_up(value: float) -> float:
    """1, 2 or 5 times a power of ten, not less than `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)
