"""`migfw status --watch`: the same again and again, live on a terminal, as lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import click

from corefw.cli.outcome import note
from corefw.cli.progress import Progress
from corefw.cli.status import facts
from corefw.errors import ChannelError, one_line

INTERVAL: Final = 1.0
"""Seconds between two looks."""


class _Screen(Protocol):
    def show(self, document: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def watch_engine(ask: Callable[[], dict[str, Any]]) -> None:
    """Show what `ask` returns until the engine has ended. KeyboardInterrupt goes through."""
    screen: _Screen = _Live() if sys.stdout.isatty() else _Lines()
    try:
        while True:
            screen.show(ask())
            time.sleep(INTERVAL)
    except ChannelError:
        screen.close()
        note("the engine has ended")
    finally:
        screen.close()


class _Lines:
    """One line whenever something changed."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, document: Mapping[str, Any]) -> None:
        line = one_line("; ".join(_phrases(document)))
        if line != self._last:
            self._last = line
            click.echo(line)

    def close(self) -> None:
        pass


def _phrases(document: Mapping[str, Any]) -> list[str]:
    """What changes: the guest, the migration, the fields of a program."""
    answer = document["migration"]
    progress = Progress.of(answer)
    phrases = [f"guest {document['status']}"]
    if document.get("incoming", "none") != "none":
        phrases.append(f"incoming {document['incoming']}")
    if progress.phase != "none":
        phrases.append(f"migration {progress.line() if 'expected-downtime' in answer else progress.phase}")
    phrases += progress.warnings
    phrases += [f"cannot migrate: {reason}" for reason in answer.get("blocked-reasons", ())]
    fields = document.get("machine", {}).get("information", {}).get("fields") or {}
    phrases += [f"{name} {value}" for name, value in fields.items()]
    return phrases


class _Live:
    """The facts in place, as `migfw status` shows them; the last ones stay when it ends."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(highlight=False), auto_refresh=False)
        self._live.start()

    def show(self, document: Mapping[str, Any]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, value in facts(document):
            style = "yellow" if name in ("warning", "cannot migrate", "error") else ""
            table.add_row(Text(f"{name}:", style="bold"), Text(one_line(value), style=style))
        self._live.update(table, refresh=True)

    def close(self) -> None:
        self._live.stop()
