"""Options that several commands share, how their values are completed, and the limits of a migration.

An option means the same in every command, and its help text exists once. For Tab completion, programs are parsed and
never imported; plugins are loaded only to complete capabilities, parameters and the names of bundled programs; URI
schemes and machines are read from the metadata of the installed distributions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from corefw.errors import MigfwError, UsageError
from corefw.quantities import parse_milliseconds

if TYPE_CHECKING:
    from corefw.client.changes import Changes
    from corefw.declarations import Value
    from corefw.qmp.engines import EngineClient

Item = CompletionItem[Any]
Completer = Callable[[click.Context, click.Parameter, str], list[Item]]


# -- Tab completion ----------------------------------------------------------------------------------------------------


def _completer(values: Callable[[str], Iterable[tuple[str, str]]]) -> Completer:
    """A completer of those (value, help) pairs of `values(incomplete)` that begin with the word typed so far.

    Errors give no completions.
    """

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[Item]:
        try:
            found = [*values(incomplete)]
        except (MigfwError, OSError):
            return []
        return [CompletionItem(value, help=text) for value, text in found if value.startswith(incomplete)]

    return complete


def _engines(_: str) -> Iterable[tuple[str, str]]:
    from corefw.qmp.address import find_engines

    return [(engine.name, "") for engine in find_engines()]


def _capabilities(_: str) -> Iterable[tuple[str, str]]:
    from corefw.client.changes import all_settings

    settings = all_settings()
    return [
        (name, settings.declared_capability(name).help)
        for name in settings.capabilities()
        if settings.implemented(name)
    ]


def _parameters(_: str) -> Iterable[tuple[str, str]]:
    """NAME= for each parameter, and NAME=VALUE if it has a fixed set of values."""
    from corefw.client.changes import all_settings

    settings = all_settings()
    for name in settings.parameters():
        if settings.implemented(name):
            declared = settings.declared_parameter(name)
            yield f"{name}=", declared.help
            yield from ((f"{name}={choice}", "") for choice in declared.choices)


def _settings(incomplete: str) -> Iterable[tuple[str, str]]:
    yield from ((f"{name}={state}", text) for name, text in _capabilities(incomplete) for state in ("on", "off"))
    yield from _parameters(incomplete)


def _properties(_: str) -> Iterable[tuple[str, str]]:
    from corefw.settings import PROPERTIES

    return [(f"{name}={state}", text) for name, (_, text) in PROPERTIES.items() for state in ("on", "off")]


def entry_point_names(group: str) -> list[str]:
    """The names of a group's installed entry points. Imports none of them."""
    from importlib.metadata import entry_points

    return sorted({point.name for point in entry_points(group=group)})


def _machines(_: str) -> Iterable[tuple[str, str]]:
    return [(name, "") for name in entry_point_names("corefw.machine")]


def _uris(incomplete: str) -> Iterable[tuple[str, str]]:
    scheme, colon, path = incomplete.partition(":")
    if colon and scheme in ("file", "unix"):
        return [(f"{scheme}:{found}", "") for found in _paths(path)]
    names = entry_point_names("corefw.transport")
    return [("ssh://" if name == "ssh" else name if name.endswith("+") else f"{name}:", "") for name in names]


def _incoming(incomplete: str) -> Iterable[tuple[str, str]]:
    return [*_uris(incomplete), ("defer", "wait for migrate-incoming")]


def _addresses(incomplete: str) -> Iterable[tuple[str, str]]:
    if incomplete.startswith("unix:"):
        return [(f"unix:{found}", "") for found in _paths(incomplete.removeprefix("unix:"))]
    return [("unix:", ""), ("tcp:", "")]


def _paths(begun: str) -> list[str]:
    """Files and folders that begin with this; folders end with a slash."""
    folder, _, name = begun.rpartition("/")
    parent = f"{folder}/" if "/" in begun else ""
    found = [entry for entry in os.scandir(parent or ".") if entry.name.startswith(name)]
    return sorted(
        f"{parent}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in found
        if name.startswith(".") or not entry.name.startswith(".")
    )


def _programs(incomplete: str) -> Iterable[tuple[str, str]]:
    """Bundled programs and files, or the classes of a file if it is the only match."""
    file, colon, _ = incomplete.rpartition(":")
    if colon:
        return [(f"{file}:{name}", text) for name, text in program_classes(Path(file))]
    files = [path for path in _paths(incomplete) if path.endswith((".py", "/"))]
    if len(files) == 1 and (classes := program_classes(Path(files[0]))):
        return [(f"{files[0]}:{name}", text) for name, text in classes]
    from corefw.plugins import Plugins

    bundled = () if "/" in incomplete else Plugins().programs("python")
    return [*((name, "bundled") for name in bundled), *((path, "") for path in files)]


def program_classes(file: Path) -> list[tuple[str, str]]:
    """The classes in a file that look like programs, each with the first line of its docstring."""
    import ast

    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    programs = {"Program"}
    for node in classes:  # a class may inherit from an earlier one
        if any(ast.unparse(base).rpartition(".")[2] in programs for base in node.bases):
            programs.add(node.name)
    found = [node for node in classes if node.name in programs]
    return [(node.name, (ast.get_docstring(node) or "").partition("\n")[0]) for node in found]


complete_engines: Final = _completer(_engines)
complete_capabilities: Final = _completer(_capabilities)
complete_parameters: Final = _completer(_parameters)
complete_settings: Final = _completer(_settings)
complete_properties: Final = _completer(_properties)
complete_machines: Final = _completer(_machines)
complete_uris: Final = _completer(_uris)
complete_incoming: Final = _completer(_incoming)
complete_addresses: Final = _completer(_addresses)
complete_programs: Final = _completer(_programs)


# -- the options -------------------------------------------------------------------------------------------------------


_Command = TypeVar("_Command", bound=Callable[..., Any])


def json_option(command: _Command) -> _Command:
    """Add --json, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(command)


def engine_options(command: _Command) -> _Command:
    """Add --name and --qmp, as the arguments `name` and `qmp`: which engine to talk to."""
    command = click.option(
        "--qmp",
        metavar="ADDRESS",
        shell_complete=complete_addresses,
        help="Talk to the engine or QEMU at unix:PATH or tcp:HOST:PORT.",
    )(command)
    return click.option(
        "--name",
        metavar="NAME",
        shell_complete=complete_engines,
        help="Talk to the engine with this name.  [default: the only running engine]",
    )(command)


def param_option(command: _Command) -> _Command:
    """Add --param, as the argument `params`."""
    return click.option(
        "--param",
        "params",
        metavar="NAME=VALUE",
        multiple=True,
        shell_complete=complete_parameters,
        help="Set a migration parameter: max-bandwidth=500M (bytes per second), downtime-limit=100ms. Repeatable.",
    )(command)


def settings_options(command: _Command) -> _Command:
    """Add --cap and --param, as the arguments `caps` and `params`: settings to change before the command starts."""
    command = param_option(command)
    return click.option(
        "--cap",
        "caps",
        metavar="NAME[=on|off]",
        multiple=True,
        shell_complete=complete_capabilities,
        help="Switch a migration capability on (or off): return-path, events, pause-before-switchover. Repeatable.",
    )(command)


class WithInstalled(click.Command):
    """A command whose help ends with the installed URI schemes and machines. Imports none of them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        with formatter.section("Installed"):
            formatter.write_dl(
                [
                    ("URI schemes", ", ".join(entry_point_names("corefw.transport")) or "none"),
                    ("machines", ", ".join(entry_point_names("corefw.machine")) or "none"),
                    ("settings", "'migfw plugins --settings' lists capabilities, parameters and properties"),
                ]
            )


# -- limits of a migration ---------------------------------------------------------------------------------------------


NO_LIMITS: Final[Mapping[str, Value]] = {
    "x-migfw-timeout": 0,
    "x-migfw-max-passes": 0,
    "x-migfw-on-timeout": "cancel",
    "x-migfw-postcopy-start": "on-command",
}
"""The parameters that hold for a single migration, and their values without a limit."""


def add_limits(
    changes: Changes,
    engine: EngineClient,
    timeout: str | None,
    max_passes: int | None,
    on_timeout: str | None,
    postcopy: str | None,
) -> None:
    """Add --timeout, --max-passes, --on-timeout and --postcopy of `migfw migrate`, as parameters of the engine. Raises
    UsageError.

    They hold for a single migration: those that neither these options nor --param give are reset.
    """
    if on_timeout is not None and timeout is None and max_passes is None:
        raise UsageError("--on-timeout says what happens at a limit: give --timeout or --max-passes as well")
    given = timeout is not None or max_passes is not None
    if not engine.is_migfw:
        if given:
            raise UsageError(
                "--timeout and --max-passes are kept by the engine, and a QEMU has no such limits"
                " (watch it with 'migfw status --watch', and end it with 'migfw cancel')"
            )
        return
    options: tuple[Value | None, ...] = (
        _parse_duration(timeout) if timeout is not None else None,
        max_passes,
        on_timeout,
        postcopy,
    )
    for (name, none), value in zip(NO_LIMITS.items(), options, strict=True):
        changes.parameters.setdefault(name, none if value is None else value)


def _parse_duration(text: str) -> int:
    """Parse a duration into milliseconds. A number without a unit is refused, because it could mean seconds."""
    milliseconds = parse_milliseconds(text)
    if text.strip()[-1:].isdigit():
        raise UsageError(f"'--timeout {text}': give a unit, as in {text}s or {text}m")
    if not milliseconds:
        raise UsageError(f"'--timeout {text}': expected a time longer than zero (leave it out for no limit)")
    return milliseconds
