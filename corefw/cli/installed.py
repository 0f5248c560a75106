"""`migfw plugins`: what is installed, and all settings; `migfw completion`: the scripts for the shells."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class
from click.shell_completion import split_arg_string as split

from corefw.cli.console import print_json, print_table
from corefw.cli.options import json_option
from corefw.quantities import format_size

if TYPE_CHECKING:
    from corefw.declarations import Parameter
    from corefw.plugins import PluginInfo, Plugins
    from corefw.settings import Settings

COMPLETE_VARIABLE: Final = "_MIGFW_COMPLETE"


# -- migfw plugins -----------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--settings", "show_settings", is_flag=True, help="List capabilities, parameters and properties instead of plugins."
)
@json_option
def plugins(show_settings: bool, as_json: bool) -> None:
    """List every installed plugin: its kind and name, its distribution, "ok" or why it failed to load, what it adds.

    If one plugin fails to load, the others still load, and the exit status is 0. With --settings: every capability,
    parameter and property, which plugin declares it, whether it is supported, and what it means.

    \b
    Kinds:
      transport   a URI scheme
      machine     a kind of guest, for 'migfw run --machine'
      plugins     sections, blockers, settings, QMP commands
      kernel      compiled code for a plugin, which works without it

    \b
    Examples:
      migfw plugins
      migfw plugins --settings
      migfw plugins --json | jq '.[] | select(.error)'
    """
    from corefw.plugins import Plugins

    logging.getLogger("corefw.plugins").setLevel(logging.ERROR)  # the table shows what failed
    loaded = Plugins.load()
    if show_settings:
        _show_settings([*_all_settings(loaded)], as_json=as_json)
        return
    found = list(loaded.inventory())
    if as_json:
        print_json([asdict(info) for info in found])
        return
    print_table(("KIND", "NAME", "DISTRIBUTION", "VERSION", "STATE"), [_plugin_row(info) for info in found])
    for info in found:
        if info.adds:
            click.echo(f"'{info.name}' adds {', '.join(info.adds)}")


def _plugin_row(info: PluginInfo) -> tuple[str, ...]:
    state = "ok" if info.error is None else f"failed: {info.error}"
    return (info.group.removeprefix("corefw."), info.name, info.distribution, info.version, state)


def _all_settings(loaded: Plugins) -> Iterator[dict[str, Any]]:
    from corefw.settings import PROPERTIES

    settings = loaded.settings()
    owners: dict[str, str] = {}
    for plugin, declared in loaded.declarations.items():
        owners |= {one.name: plugin for one in declared.capabilities} | {
            one.name: plugin for one in declared.parameters
        }
    for name, state in settings.capabilities().items():
        yield _setting("capability", name, state, settings, owners) | {"help": settings.declared_capability(name).help}
    for name, value in settings.parameters().items():
        yield _setting("parameter", name, value, settings, owners) | {"help": settings.declared_parameter(name).help}
    for name, (state, text) in PROPERTIES.items():
        known = {"kind": "property", "name": name, "default": state, "shown": _shown(state, None)}
        yield known | {"from": "core", "supported": True, "help": text}


def _setting(kind: str, name: str, value: object, settings: Settings, owners: dict[str, str]) -> dict[str, Any]:
    supported = settings.implemented(name)
    return {
        "kind": kind,
        "name": name,
        "default": list(value) if isinstance(value, tuple) else value,
        "shown": _shown(value, settings.declared_parameter(name) if kind == "parameter" else None),
        "from": owners.get(name, "core"),
        "supported": supported,
    }


def _shown(value: object, declared: Parameter | None) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if declared is not None and declared.kind in ("size", "rate") and isinstance(value, int):
        return format_size(value)
    return str(value) if value not in ("", ()) else "-"


def _show_settings(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json([{key: value for key, value in one.items() if key != "shown"} for one in found])
        return
    rows = [
        (
            one["kind"],
            one["name"],
            one["shown"],
            "yes" if one["supported"] else "refused",
            one["from"],
            one["help"],
        )
        for one in found
    ]
    print_table(("KIND", "NAME", "DEFAULT", "SUPPORTED", "FROM", "MEANING"), rows)


# -- migfw completion --------------------------------------------------------------------------------------------------

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

    def format_completion(self, item: CompletionItem[Any]) -> str:
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
