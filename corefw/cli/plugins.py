"""`migfw plugins`: what is installed, from where, and whether it loads."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from corefw.cli.options import json_option
from corefw.cli.output import print_json, print_table

if TYPE_CHECKING:
    from corefw.plugins import PluginInfo


@click.command()
@json_option
def plugins(as_json: bool) -> None:
    """List every installed plugin: its kind and name, the distribution it comes from, and "ok" or why it does not load.

    A plugin that fails to load takes no other down; the exit status is 0 all the same.

    \b
    Kinds:
      transport   a URI scheme
      machine     a kind of guest, for 'migfw run --machine'
      plugins     section handlers, blockers, settings, commands

    \b
    Examples:
      migfw plugins
      migfw plugins --json | jq '.[] | select(.error)'
    """
    import logging

    from corefw.plugins import Plugins

    logging.getLogger("corefw.plugins").setLevel(logging.ERROR)  # the table says what failed; once is enough
    found = list(Plugins.load().inventory())
    if as_json:
        print_json([asdict(info) for info in found])
        return
    print_table(("KIND", "NAME", "DISTRIBUTION", "VERSION", "STATE"), [_row(info) for info in found])


def _row(info: PluginInfo) -> tuple[str, ...]:
    state = "ok" if info.error is None else f"failed: {info.error}"
    return (info.group.removeprefix("corefw."), info.name, info.distribution, info.version, state)
