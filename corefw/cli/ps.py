"""`migfw ps`: the engines of this user on this host."""

from __future__ import annotations

import click

from corefw.cli.engines import connect
from corefw.cli.options import json_option
from corefw.cli.output import print_json, print_table
from corefw.errors import MigfwError
from corefw.qmp.address import EngineInfo, find_engines


@click.command()
@json_option
def ps(as_json: bool) -> None:
    """List your engines on this host: name, process, machine, state of the guest, migration, address and log.

    Engines started with 'migfw run --qmp ADDRESS' are not listed.

    \b
    Examples:
      migfw ps
      migfw ps --json | jq -r '.[].name'
    """
    found = [facts for engine in find_engines() if (facts := _ask(engine))]
    if as_json:
        print_json(found)
        return
    columns = ("name", "pid", "machine", "guest", "migration", "qmp", "log")
    print_table(
        [column.upper() for column in columns], [[str(facts[column] or "-") for column in columns] for facts in found]
    )


def _ask(engine: EngineInfo) -> dict[str, object] | None:
    """None for one that ended in between, and for one whose end is not an engine of ours."""
    try:
        with connect(None, str(engine.address)) as client:
            status = client.call("x-migfw-status")
            return {
                "name": engine.name,
                "pid": status["pid"],
                "machine": status["machine"]["kind"],
                "guest": client.run_state(),
                "migration": client.migration_status(),
                "qmp": str(engine.address),
                "log": (status.get("launch") or {}).get("log"),
            }
    except MigfwError:
        return None
