"""How far a migration is, shown while it runs.

The law: a display gets query-migrate's answers and knows nothing of where they come from. On a terminal it is live;
where stdout is a file or a pipe it is plain lines, one a second at most and only when something changed; beside --json,
stdout stays clean, and a terminal on stderr has the live one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from corefw.closing import Closing
from corefw.quantities import format_milliseconds, format_size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LINE_INTERVAL: Final = 1.0
"""Seconds between two plain lines, at least."""

_MEGABIT: Final = 125_000
"""Bytes in one of QAPI's megabits (`mbps`)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One answer of query-migrate, in bytes, bytes per second and milliseconds; zero where it says nothing.

    passes     times that the dirty log was harvested, the pass now running included
    fraction   of the RAM that does not have to be sent again, 0 to 1
    """

    phase: str = "none"
    total: int = 0
    remaining: int = 0
    transferred: int = 0
    rate: float = 0.0
    dirty_rate: int = 0
    passes: int = 0
    expected_downtime: int = 0
    elapsed: int = 0

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Progress:
        ram = answer.get("ram", {})
        return cls(
            phase=answer.get("status", "none"),
            total=ram.get("total", 0),
            remaining=ram.get("remaining", 0),
            transferred=ram.get("transferred", 0),
            rate=ram.get("mbps", 0.0) * _MEGABIT,
            dirty_rate=ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096),
            passes=ram.get("dirty-sync-count", 0),
            expected_downtime=answer.get("expected-downtime", 0),
            elapsed=answer.get("total-time", 0),
        )

    @property
    def fraction(self) -> float:
        return min(1.0, max(0.0, 1 - self.remaining / self.total)) if self.total else 0.0

    def details(self) -> list[str]:
        """The figures that are known, as phrases, most wanted first."""
        known = [f"{format_size(self.remaining)} to go"] if self.total else []
        if self.rate:
            known.append(f"{format_size(self.rate)}/s")
        if self.dirty_rate:
            known.append(f"dirtied {format_size(self.dirty_rate)}/s")
        if self.expected_downtime:
            known.append(f"expected downtime {format_milliseconds(self.expected_downtime)}")
        return known

    def heading(self) -> str:
        return f"{self.phase}, pass {self.passes}" if self.passes else self.phase


class Display(Closing):
    """Shows nothing. The base of those that show something; `with` it, so that a terminal is left in order."""

    def update(self, progress: Progress) -> None:
        """The latest answer."""

    def say(self, text: str) -> None:
        """One line that stays, beside the progress."""

    def close(self) -> None:
        """No more updates. Idempotent."""


class Lines(Display):
    """Plain lines."""

    def __init__(self, write: Callable[[str], None] = click.echo, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._next = float("-inf")
        self._last = ""

    def update(self, progress: Progress) -> None:
        if not progress.total:
            return
        line = ", ".join([progress.heading(), f"{100 * progress.fraction:.0f} %", *progress.details()])
        if line == self._last or self._clock() < self._next:
            return
        self._last, self._next = line, self._clock() + LINE_INTERVAL
        self._write(line)

    def say(self, text: str) -> None:
        self._write(text)


class Live(Display):
    """A bar and two lines of figures that stay in place; gone when the migration is over, for the summary follows."""

    def __init__(self, title: str, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._title = title
        self._console: Console = Console(file=stream, highlight=False)
        self._live = RichLive(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def update(self, progress: Progress) -> None:
        self._live.update(self._picture(progress), refresh=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def close(self) -> None:
        self._live.stop()

    def _picture(self, progress: Progress) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=1.0, completed=progress.fraction, width=40),
            Text(f"{100 * progress.fraction:5.1f} %", style="bold"),
            Text(progress.heading(), style="cyan"),
        )
        figures = [*progress.details(), f"{format_size(progress.transferred)} sent"]
        if progress.elapsed:
            figures.append(format_milliseconds(progress.elapsed))
        return Group(Text(self._title, style="bold"), bar, Text("  ".join(figures), style="dim"))


def open_display(title: str, *, as_json: bool) -> Display:
    """The display that fits where the output goes; `title` heads a live one."""
    stream = sys.stderr if as_json else sys.stdout
    if stream.isatty():
        return Live(title, stream)
    return Display() if as_json else Lines()
