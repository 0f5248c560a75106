"""How far a migration is, shown while it runs.

A display gets query-migrate's answers and knows nothing of where they come from. On a terminal it is live; where stdout
is a file or a pipe it is plain lines, one a second at most and only when something changed; beside --json, stdout stays
clean, and a terminal on stderr has the live one. What the figures mean is in docs/decisions/progress.md.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from corefw.closing import Closing
from corefw.quantities import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LINE_INTERVAL: Final = 1.0
"""Seconds between two plain lines, at least."""

_MEGABIT: Final = 125_000
"""Bytes in one of QAPI's megabits (`mbps`)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One answer of query-migrate, in bytes, bytes per second and milliseconds; zero or None where it says nothing.

    total, remaining    over all live sections; of a real QEMU, its RAM
    passes              times that the dirty log was harvested, the pass now running included
    time_left           until the guest runs on the destination
    pass_time_left      until the present pass has been sent
    fraction            of the guest's state that does not have to be sent again, 0 to 1
    """

    phase: str = "none"
    total: int = 0
    remaining: int = 0
    transferred: int = 0
    rate: float = 0.0
    dirty_rate: int = 0
    passes: int = 0
    time_left: int | None = None
    pass_time_left: int | None = None
    expected_downtime: int | None = None
    converges: bool | None = None
    elapsed: int = 0
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Progress:
        ram, own = answer.get("ram", {}), answer.get("x-migfw", {})
        measured = ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)
        # QEMU begins with the downtime limit, and has measured the downtime once it knows the dirty rate.
        downtime = answer.get("expected-downtime") if measured and not own else None
        return cls(
            phase=answer.get("status", "none"),
            total=own.get("total") or ram.get("total", 0),
            remaining=own["remaining"] if own.get("total") else ram.get("remaining", 0),
            transferred=ram.get("transferred", 0),
            rate=ram.get("mbps", 0.0) * _MEGABIT,
            dirty_rate=own.get("dirty-rate", measured),
            passes=ram.get("dirty-sync-count", 0),
            time_left=own.get("time-left"),
            pass_time_left=own.get("pass-time-left"),
            expected_downtime=own.get("expected-downtime", downtime),
            converges=own.get("converges"),
            elapsed=answer.get("total-time", 0),
            warnings=tuple(own.get("warnings", ())),
        )

    @property
    def fraction(self) -> float:
        return min(1.0, max(0.0, 1 - self.remaining / self.total)) if self.total else 0.0

    @property
    def percent(self) -> str:
        """Rounded down: there are no 100 % while anything is left."""
        return f"{math.floor(100 * self.fraction)} %"

    def details(self) -> list[str]:
        """The figures that are known, as phrases, most wanted first."""
        known = [f"{format_size(self.remaining)} of {format_size(self.total)} left"] if self.total else []
        if self.converges is False:
            known.append("will not converge")
        elif self.time_left is not None:
            known.append(f"done in about {format_duration(self.time_left)}")
        elif self.pass_time_left is not None and self.remaining:
            known.append(f"this pass ends in about {format_duration(self.pass_time_left)}")
        if self.rate:
            known.append(f"{format_size(self.rate)}/s")
        if self.dirty_rate:
            known.append(f"dirtied {format_size(self.dirty_rate)}/s")
        if self.expected_downtime is not None:
            known.append(f"expected downtime {format_duration(self.expected_downtime)}")
        return known

    def heading(self) -> str:
        return f"{self.phase}, pass {self.passes}" if self.passes else self.phase

    def line(self) -> str:
        """Everything in one line."""
        percent = [self.percent] if self.total else []
        return ", ".join([self.heading(), *percent, *self.details()])


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
        self._warned = False

    def update(self, progress: Progress) -> None:
        if not progress.total:
            return
        if bool(progress.warnings) is not self._warned:
            self._warned = not self._warned
            for warning in progress.warnings:
                self._write(warning)
        line = progress.line()
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
            Text(progress.percent, style="bold"),
            Text(progress.heading(), style="cyan"),
        )
        figures = [*progress.details(), f"{format_size(progress.transferred)} sent"]
        if progress.elapsed:
            figures.append(f"running for {format_duration(progress.elapsed)}")
        warnings = [Text(warning, style="yellow") for warning in progress.warnings]
        return Group(Text(self._title, style="bold"), bar, Text("  ".join(figures), style="dim"), *warnings)


def open_display(title: str, *, as_json: bool) -> Display:
    """The display that fits where the output goes; `title` heads a live one."""
    stream = sys.stderr if as_json else sys.stdout
    if stream.isatty():
        return Live(title, stream)
    return Display() if as_json else Lines()
