"""What commands show while they run: on a terminal live, otherwise plain lines.

On a terminal the picture is updated in place. If stdout is a file or a pipe, lines are printed, and only when something
has changed. With --json, stdout stays clean, and a live picture is on stderr if that is a terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TextIO

import click

from corefw.client.follow import Display
from corefw.client.progress import Progress
from corefw.closing import Closing
from corefw.errors import one_line
from corefw.quantities import format_duration, format_milliseconds, format_size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live as RichLive

    from corefw.net.relay import RelayProgress
    from corefw.wire.stream import Source

# -- a migration -------------------------------------------------------------------------------------------------------


LINE_INTERVAL: Final = 1.0
"""Minimum number of seconds between two plain lines."""


class Lines(Display):
    """Progress as plain lines."""

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
    """A bar and two lines of figures, updated in place. It disappears when the migration is over: a summary follows."""

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
    """Choose the display for where the output goes. `title` is the heading of a live one."""
    stream = sys.stderr if as_json else sys.stdout
    if stream.isatty():
        return Live(title, stream)
    return Display() if as_json else Lines()


# -- a relay -----------------------------------------------------------------------------------------------------------


RELAY_LINE_INTERVAL: Final = 5.0
"""The same for a relay."""

_SMOOTHING: Final = 0.3
"""Weight of the latest measurement in the rate that is shown."""


def amount(progress: RelayProgress, *, two_way: bool = True) -> str:
    """A phrase: "1.0 GiB and 12.0 KiB back"."""
    back = f" and {format_size(progress.backward)} back" if two_way else ""
    return f"{format_size(progress.forward)}{back}"


class RelayDisplay(Closing):
    """Progress of the relay: live on a terminal, otherwise plain lines, and nothing on stdout with --json."""

    def __init__(self, title: str, *, as_json: bool) -> None:
        stream = sys.stderr if as_json else sys.stdout
        self._title = title
        self._live: RichLive | None = None
        self._lines = not as_json and not stream.isatty()
        self._next_line = time.monotonic() + RELAY_LINE_INTERVAL
        self._last = (time.monotonic(), 0)
        self._rate = 0.0
        if stream.isatty():
            from rich.console import Console
            from rich.live import Live as RichLive

            self._live = RichLive(console=Console(file=stream, highlight=False), auto_refresh=False, transient=True)
            self._live.start()

    def update(self, progress: RelayProgress) -> None:
        now, total = time.monotonic(), progress.forward + progress.backward
        then, before = self._last
        if now > then:
            self._rate += _SMOOTHING * ((total - before) / (now - then) - self._rate)
        self._last = (now, total)
        text = f"{progress.phase}: {amount(progress)}, {format_size(self._rate)}/s"
        if progress.phase != "relaying":
            text = str(progress.phase)
        if self._live:
            self._show(text, progress)
        elif self._lines and now >= self._next_line and total != before:
            self._next_line = now + RELAY_LINE_INTERVAL
            click.echo(text)

    def _show(self, text: str, progress: RelayProgress) -> None:
        from rich.console import Group
        from rich.text import Text

        assert self._live
        elapsed = f"  {format_milliseconds(progress.seconds * 1000)}" if progress.seconds else ""
        self._live.update(Group(Text(self._title, style="bold"), Text(text + elapsed, style="cyan")), refresh=True)

    def close(self) -> None:
        """Idempotent."""
        if self._live:
            self._live.stop()


# -- an engine's status ------------------------------------------------------------------------------------------------


class Screen(Protocol):
    """Shows an engine's status, again and again."""

    def show(self, phrases: Sequence[str], facts: Sequence[tuple[str, str]]) -> None:
        """Show the present status: in a line, `phrases` alone, which are what may change; in a picture, `facts`."""

    def close(self) -> None: ...


def open_screen() -> Screen:
    """Choose the screen for where stdout goes."""
    return _Picture() if sys.stdout.isatty() else _Lines()


class _Lines:
    """One line whenever something has changed."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, phrases: Sequence[str], _facts: Sequence[tuple[str, str]]) -> None:
        line = one_line("; ".join(phrases))
        if line != self._last:
            self._last = line
            click.echo(line)

    def close(self) -> None:
        pass


class _Picture:
    """The lines of `migfw status`, updated in place. The last ones stay on the terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._live = RichLive(console=Console(highlight=False), auto_refresh=False)
        self._live.start()

    def show(self, _phrases: Sequence[str], facts: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, value in facts:
            style = "yellow" if name in ("warning", "cannot migrate", "error") else ""
            table.add_row(Text(f"{name}:", style="bold"), Text(one_line(value), style=style))
        self._live.update(table, refresh=True)

    def close(self) -> None:
        self._live.stop()


# -- a file that is read -----------------------------------------------------------------------------------------------


READ_INTERVAL: Final = 0.5
"""Seconds between two updates of the progress line."""


class ReadingDisplay:
    """A source that shows on a terminal how much has been read."""

    def __init__(self, source: Source, size: int | None) -> None:
        self._source = source
        self._size = size
        self._read = 0
        self._next = time.monotonic() + READ_INTERVAL
        self._shown = False
        self._terminal = sys.stderr.isatty()

    def receive_into(self, view: memoryview, /) -> int:
        count = self._source.receive_into(view)
        self._read += count
        if self._terminal and count and time.monotonic() >= self._next:
            self._show()
        return count

    def clear(self) -> None:
        """Remove the progress line."""
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)

    def _show(self) -> None:
        of = f" of {format_size(self._size)}, {100 * self._read // self._size} %" if self._size else ""
        click.echo(f"\r\x1b[Kmigfw: read {format_size(self._read)}{of}", err=True, nl=False)
        self._next, self._shown = time.monotonic() + READ_INTERVAL, True
