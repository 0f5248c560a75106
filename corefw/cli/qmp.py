"""`migfw qmp`: one command, one answer."""

from __future__ import annotations

import json

import click

from corefw.cli.engines import connect
from corefw.cli.options import engine_options, split_pairs
from corefw.cli.output import print_json


@click.command()
@click.argument("command")
@click.argument("arguments", metavar="[NAME=VALUE]...", nargs=-1)
@engine_options
def qmp(command: str, arguments: tuple[str, ...], name: str | None, qmp: str | None) -> None:
    """Send one QMP command and print what it returns, as JSON.

    A VALUE that is valid JSON is sent as such (numbers, true, false, null, "strings", lists, objects); any other is
    sent as a string.

    \b
    Examples:
      migfw qmp query-migrate
      migfw qmp migrate-set-parameters max-bandwidth=1000000
      migfw qmp migrate uri=tcp:other:4444
      migfw qmp query-commands --qmp unix:/run/qemu.sock | jq -r '.[].name'
    """
    values = {key: _value(text) for key, text in split_pairs(arguments, "NAME=VALUE").items()}
    with connect(name, qmp) as engine:
        print_json(engine.call(command, **values))


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
