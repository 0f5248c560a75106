"""Options that several commands share, and how their values are written.

Invariant: an option means the same and reads the same wherever it is; its help text is here once. A value that is wrong
is refused before anything is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import click

from corefw.cli import completion
from corefw.errors import UsageError
from corefw.quantities import parse_switch

_Command = TypeVar("_Command", bound=Callable[..., Any])


def json_option(command: _Command) -> _Command:
    """--json as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(command)


def engine_options(command: _Command) -> _Command:
    """--name and --qmp, as the arguments `name` and `qmp`: which engine to talk to."""
    command = click.option(
        "--qmp",
        metavar="ADDRESS",
        shell_complete=completion.addresses,
        help="Talk to the engine or QEMU at unix:PATH or tcp:HOST:PORT.",
    )(command)
    return click.option(
        "--name",
        metavar="NAME",
        shell_complete=completion.engines,
        help="Talk to the engine with this name.  [default: the only running engine]",
    )(command)


PARAMETER: Final = "--param NAME=VALUE, as in --param downtime-limit=100ms"
"""The form of --param, for error messages."""


def param_option(command: _Command) -> _Command:
    """--param, as the argument `params`."""
    return click.option(
        "--param",
        "params",
        metavar="NAME=VALUE",
        multiple=True,
        shell_complete=completion.parameters,
        help="Set a migration parameter: max-bandwidth=500M (bytes per second), downtime-limit=100ms. Repeatable.",
    )(command)


def settings_options(command: _Command) -> _Command:
    """--cap and --param, as the arguments `caps` and `params`: changes made before the command starts anything."""
    command = param_option(command)
    return click.option(
        "--cap",
        "caps",
        metavar="NAME[=on|off]",
        multiple=True,
        shell_complete=completion.capabilities,
        help="Switch a migration capability on (or off): return-path, events, pause-before-switchover. Repeatable.",
    )(command)


def split_pairs(texts: Iterable[str], what: str) -> dict[str, str]:
    """("a=1", "b=2") -> {"a": "1", "b": "2"}. Raises UsageError for one without "=", or a name given twice."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"'{text}': expected {what}")
        if name in pairs:
            raise UsageError(f"'{name}' is given twice: '{pairs[name]}' and '{value}'")
        pairs[name] = value
    return pairs


def parse_switches(texts: Iterable[str], what: str) -> dict[str, bool]:
    """("a", "b=off") -> {"a": True, "b": False}. Raises UsageError for another word than on or off."""
    pairs = split_pairs((text if "=" in text else f"{text}=on" for text in texts), what)
    return {name: read_switch(name, word) for name, word in pairs.items()}


def read_switch(name: str, word: str) -> bool:
    """The state that NAME=WORD sets. Raises UsageError."""
    try:
        return parse_switch(word)
    except UsageError:
        raise UsageError(f"'{name}={word}': expected {name}=on or {name}=off") from None
