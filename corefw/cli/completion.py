"""Tab completion, `migfw completion`, and the list of what is installed in the help of `run` and `migrate`.

Programs are parsed and never imported. Plugins are loaded only to complete capabilities, parameters and the names of
bundled programs; URI schemes and machines are read from the metadata of the installed distributions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class
from click.shell_completion import split_arg_string as split

from corefw.errors import MigfwError

COMPLETE_VARIABLE: Final = "_MIGFW_COMPLETE"

Item = CompletionItem[Any]
Completer = Callable[[click.Context, click.Parameter, str], list[Item]]


# -- what may follow ---------------------------------------------------------------------------------------------------


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
    from corefw.cli.options import all_settings

    settings = all_settings()
    return [
        (name, settings.declared_capability(name).help)
        for name in settings.capabilities()
        if settings.implemented(name)
    ]


def _parameters(_: str) -> Iterable[tuple[str, str]]:
    """NAME= for each parameter, and NAME=VALUE if it has a fixed set of values."""
    from corefw.cli.options import all_settings

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


engines: Final = _completer(_engines)
capabilities: Final = _completer(_capabilities)
parameters: Final = _completer(_parameters)
settings: Final = _completer(_settings)
properties: Final = _completer(_properties)
machines: Final = _completer(_machines)
uris: Final = _completer(_uris)
incoming: Final = _completer(_incoming)
addresses: Final = _completer(_addresses)
programs: Final = _completer(_programs)


# -- the shells --------------------------------------------------------------------------------------------------------

_BASH: Final = """\
%(complete_func)s() {
    local IFS=$'\\n' reply type value
    reply=$(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1")
    COMPREPLY=()
    for reply in $reply; do
        IFS=',' read -r type value <<< "$reply"
        case $type in
            plain) COMPREPLY+=("$value") ;;
            *) compopt -o default ;;
        esac
        case $value in
            *[=:/]) compopt -o nospace ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """Completion for bash, which splits words at ":" and "=" (COMP_WORDBREAKS), found in URIs, programs and parameters.
    So the words are taken from the line itself, and only what follows the last such character is returned.
    """

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split(line)[1:]
        incomplete = words.pop() if words and not line[-1:].isspace() else ""
        return words, incomplete

    def format_completion(self, item: Item) -> str:
        _, incomplete = self.get_completion_args()
        if incomplete.startswith("-") and "=" in incomplete:  # --option=VALUE: click completes the value alone
            incomplete = incomplete.partition("=")[2]
        breaks = [character for character in ":=" if character in os.environ.get("COMP_WORDBREAKS", ":=")]
        cut = max((incomplete.rfind(character) + 1 for character in breaks), default=0)
        value = str(item.value)
        return f"{item.type},{value[cut:] if value.startswith(incomplete[:cut]) else value}"


def register_shells() -> None:
    """Make click use `Bash` of this module."""
    add_completion_class(Bash, "bash")


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the Tab completion script for SHELL. It completes engines, programs and their classes, capabilities,
    parameters, machines and schemes.

    \b
    Examples:
      echo 'eval "$(migfw completion bash)"' >> ~/.bashrc
      echo 'eval "$(migfw completion zsh)"' >> ~/.zshrc
      migfw completion fish > ~/.config/fish/completions/migfw.fish
    """
    from corefw.cli.group import migfw

    register_shells()
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(migfw, {}, "migfw", COMPLETE_VARIABLE).source(), nl=False)


# -- in the help of a command ------------------------------------------------------------------------------------------


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
