"""docs/command-line.md has every command and every option, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import click

from corefw.cli.group import COMMANDS, migfw

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
SECTION = re.compile(r"^### migfw (\S+)\n\n```\n(.*?)```\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"--[a-z][a-z-]*")
EVERYWHERE = {"--help", "--verbose"}
COMMON = PAGE.partition("## What all commands have in common")[2].partition("\n## ")[0]


def commands() -> dict[str, click.Command]:
    context = click.Context(migfw, info_name="migfw")
    found = {name: migfw.get_command(context, name) for name in migfw.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def options(command: click.Command) -> set[str]:
    """The options of a command, without those that all commands have."""
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    return {name for one in shown for name in one.opts if name.startswith("--")} - EVERYWHERE


def test_the_page_has_the_commands_in_the_order_of_the_help() -> None:
    headings = re.findall(r"^## (Guests|Migration|Tools)$|^### migfw (\S+)$", PAGE, re.MULTILINE)
    assert [heading or name for heading, name in headings] == [
        line for part, entries in COMMANDS.items() for line in (part, *(name for name in entries))
    ]


def test_a_synopsis_has_all_options_of_its_command() -> None:
    synopses = {name: set(OPTION.findall(synopsis)) for name, synopsis, _ in SECTION.findall(PAGE)}
    assert synopses == {name: options(command) for name, command in commands().items()}


def test_a_synopsis_has_all_arguments_of_its_command() -> None:
    for name, synopsis, _ in SECTION.findall(PAGE):
        for one in commands()[name].params:
            if isinstance(one, click.Argument):
                wanted = re.search(r"[A-Z=]+", one.make_metavar(click.Context(commands()[name])))
                assert wanted
                assert wanted[0] in synopsis, name


def test_every_option_is_explained() -> None:
    common = set(OPTION.findall(COMMON))
    assert common >= EVERYWHERE
    for name, synopsis, text in SECTION.findall(PAGE):
        explained = {row for line in text.splitlines() if line.startswith("| `--") for row in OPTION.findall(line[:40])}
        assert set(OPTION.findall(synopsis)) <= explained | common, name
        assert explained <= set(OPTION.findall(synopsis)), name
