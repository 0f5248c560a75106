"""The table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.results import Outcome, Row

COLUMNS: Final = ("ours", "QEMU", "ratio", "goal", "met")
WIDTH: Final = 120
VERDICTS: Final = {True: "[green]yes[/]", False: "[bold red]no[/]", None: ""}


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Print one line per row. If stdout is not a terminal: without colours, and wide enough that nothing is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for outcome in outcomes:
        table = Table(title=outcome.title, title_justify="left", title_style="bold", expand=False)
        table.add_column("what")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for row in outcome.rows:
            table.add_row(*cells(row), VERDICTS[row.met])
        console.print(table)
        for note in outcome.notes:
            console.print(note)
        console.print()


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """(what, ours, QEMU's, ratio, goal) as text."""
    unit = f" {row.unit}" if row.unit else ""
    goal = f"{row.goal.of} {row.goal.bound} {row.goal.limit:g}" if row.goal else ""
    return (
        row.what,
        f"{number(row.ours)}{unit}",
        "" if row.qemu is None else f"{number(row.qemu)}{unit}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        goal,
    )


def number(value: float) -> str:
    """Format with three significant digits: 2345, 234, 23.4, 2.34, 0.234."""
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"
