"""The commands that send one QMP command to an engine each, `migfw qmp` and `migfw ps`.

A command that changes something prints one line about the new state, or a JSON document with --json.
"""

from __future__ import annotations

import json
from typing import Final

import click

from corefw.cli.console import print_facts, print_json, print_table
from corefw.cli.options import complete_settings, complete_uris, engine_options, json_option
from corefw.client.changes import read_mixed, split_pairs
from corefw.client.progress import cancelled
from corefw.errors import MigfwError, UsageError, one_line
from corefw.machine import RunState
from corefw.qmp.address import EngineInfo, find_engines
from corefw.qmp.engines import EngineClient, connect
from corefw.uri import MigrationUri

QUIT_SECONDS: Final = 30.0
"""Seconds that an engine may take to end its guest."""


def _confirm(engine: EngineClient, text: str, *, as_json: bool) -> None:
    """Print what was done, or with --json the states of the guest and the migration."""
    if as_json:
        print_json({"guest": engine.run_state(), "migration": engine.migration_status()})
    else:
        click.echo(text)


@click.command()
@engine_options
@json_option
def stop(name: str | None, qmp: str | None, as_json: bool) -> None:
    """Stop the guest until 'migfw cont'.

    \b
    Example:
      migfw stop --name heat
    """
    with connect(name, qmp) as engine:
        engine.call("stop")
        if (state := engine.run_state()) == RunState.FINISH_MIGRATE:
            raise MigfwError("the guest has left for the destination: stop it there")
        _confirm(engine, f"the guest is {state}", as_json=as_json)


@click.command()
@engine_options
@json_option
def cont(name: str | None, qmp: str | None, as_json: bool) -> None:
    """Resume a stopped guest.

    Refused on the source once the destination has confirmed that it has the guest. If the destination could not confirm
    it (file:, exec:, a connection that broke at the end), the guest is started: first make sure that it does not run
    elsewhere, because a guest must never run twice.

    \b
    Example:
      migfw cont --name heat
    """
    with connect(name, qmp) as engine:
        engine.call("cont")
        _confirm(engine, f"the guest is {engine.run_state()}", as_json=as_json)


@click.command("quit")
@engine_options
@click.option("--force", is_flag=True, help="End it even in postcopy, which loses the guest on both hosts.")
def quit_engine(name: str | None, qmp: str | None, force: bool) -> None:
    """End the engine and its guest. The guest's memory is lost.

    In postcopy each side has a part of the guest, so ending either of them loses the guest. That needs --force.

    \b
    Example:
      migfw quit --name heat
    """
    with connect(name, qmp) as engine:
        if not force and engine.has_part_of_guest():
            raise UsageError(
                f"the guest is in postcopy (status '{engine.migration_status()}'): part of it is here and the rest on"
                " the other host, so it is lost if either side ends (--force ends this one anyway)"
            )
        if not engine.quit(QUIT_SECONDS):
            raise MigfwError(f"the engine at {engine.address} was asked to quit, but is still running")


@click.command()
@engine_options
@json_option
def verify(name: str | None, qmp: str | None, as_json: bool) -> None:
    """Ask the guest to check its own state, and print the result.

    The guest is stopped during the check. The exit status is 1 if its state is damaged.

    \b
    Example:
      migfw verify --name stress
    """
    with connect(name, qmp) as engine:
        facts = engine.call("x-migfw-verify")
    if as_json:
        print_json(facts)
        return
    print_facts([(str(key), str(value)) for key, value in facts.items()])
    click.echo("verified: ok")


@click.command()
@engine_options
@json_option
def cancel(name: str | None, qmp: str | None, as_json: bool) -> None:
    """Cancel the running migration, if there is one; the guest keeps running here.

    A destination drops the incoming guest, tells the source, and stops waiting; 'migfw qmp migrate-incoming uri=URI'
    makes it wait again.

    \b
    Example:
      migfw cancel --name heat
    """
    with connect(name, qmp) as engine:
        engine.call("migrate_cancel")
        engine.wait_idle()
        how = cancelled(engine.query_migrate(), state := engine.run_state())
        _confirm(engine, f"migration: {how}; the guest is {state}", as_json=as_json)


@click.command("continue")
@engine_options
@json_option
def continue_migration(name: str | None, qmp: str | None, as_json: bool) -> None:
    """Complete a migration that waits in pre-switchover.

    A migration waits there if the capability pause-before-switchover is on. The guest is stopped, and everything but
    the last part of its state has been sent.

    \b
    Example:
      migfw migrate tcp:other:4444 --cap pause-before-switchover --detach
      migfw continue
    """
    with connect(name, qmp) as engine:
        engine.call("migrate-continue", state="pre-switchover")
        _confirm(engine, "the migration continues", as_json=as_json)


@click.command()
@engine_options
@json_option
def postcopy(name: str | None, qmp: str | None, as_json: bool) -> None:
    """Start the guest on the destination now; the remaining RAM follows.

    The migration must have been started with the capability postcopy-ram, or with dirty-bitmaps, and then only the
    bitmaps follow. 'migfw migrate --postcopy' switches by itself.

    \b
    Example:
      migfw migrate tcp:other:4444 --cap postcopy-ram --detach
      migfw postcopy
    """
    with connect(name, qmp) as engine:
        engine.call("migrate-start-postcopy")
        _confirm(engine, "the migration switches to postcopy", as_json=as_json)


@click.command()
@engine_options
@json_option
def pause(name: str | None, qmp: str | None, as_json: bool) -> None:
    """Close the connection of a postcopy migration, to recover it over another one.

    \b
    Example:
      migfw pause                          on the source
      migfw recover tcp:0.0.0.0:4445       on the destination
      migfw migrate tcp:other:4445 --resume
    """
    with connect(name, qmp) as engine:
        engine.call("migrate-pause")
        _confirm(engine, "the migration is paused", as_json=as_json)


@click.command()
@click.argument("uri", shell_complete=complete_uris)
@engine_options
@json_option
def recover(uri: str, name: str | None, qmp: str | None, as_json: bool) -> None:
    """On the destination, wait at URI for the source to resume a broken postcopy migration.

    \b
    Example:
      migfw recover tcp:0.0.0.0:4445
    """
    MigrationUri.parse(uri)
    with connect(name, qmp) as engine:
        engine.call("migrate-recover", uri=uri)
        if engine.is_migfw:  # with port 0 it is another one
            uri = engine.call("x-migfw-status")["incoming-uri"]
        _confirm(engine, f"waiting for the source to resume at {one_line(uri)}", as_json=as_json)


@click.command("set")
@click.argument("pairs", metavar="NAME=VALUE...", nargs=-1, required=True, shell_complete=complete_settings)
@engine_options
@json_option
def set_values(pairs: tuple[str, ...], name: str | None, qmp: str | None, as_json: bool) -> None:
    """Change migration capabilities (NAME=on, NAME=off) and parameters (NAME=VALUE), all or none.

    Parameters may change while a migration runs. Rates and sizes take K, M, G (powers of 1024), times ms or s;
    without a unit they are bytes, bytes per second and milliseconds. max-bandwidth=0 means no limit.

    \b
    Examples:
      migfw set max-bandwidth=200M downtime-limit=50ms
      migfw set return-path=on events=on
    """
    with connect(name, qmp) as engine:
        changes = read_mixed(pairs, engine.capabilities(), plugins=engine.is_migfw)
        changes.apply(engine)
    made = {**changes.capabilities, **changes.parameters}
    if as_json:
        print_json(made)
        return
    shown = {True: "on", False: "off"}
    print_facts([(key, shown[value] if isinstance(value, bool) else str(value)) for key, value in made.items()])


# -- migfw ps ----------------------------------------------------------------------------------------------------------


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
    """Describe an engine. Returns None if it has ended meanwhile, or is not one of ours."""
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


# -- migfw qmp ---------------------------------------------------------------------------------------------------------


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
