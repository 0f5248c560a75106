"""What goes to stdout: documents, tables, lines.

The law: with --json, exactly one document and nothing else; without, plain text that needs no terminal. A fact is
one line, whatever it quotes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from corefw.errors import one_line


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as what is in them; the last one is not padded."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings) - 1)]
    for row in (headings, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Lines of "name: value", the values under each other."""
    width = max((len(name) for name, _ in facts), default=0) + 2
    for name, value in facts:
        click.echo(f"{name + ':':<{width}}{one_line(value)}")
