"""`migfw run`: create a guest, its engine and the QMP server, and run them until the end.

Invariant: mistakes on the command line are refused before the guest is created, and every way out cleans up, so nothing
is left behind.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from corefw.cli import LeavingAtOnce
from corefw.cli.console import ExitStatus, Finished, announce, note, print_json
from corefw.cli.options import (
    WithInstalled,
    complete_addresses,
    complete_incoming,
    complete_machines,
    complete_programs,
    complete_properties,
    settings_options,
)
from corefw.client.changes import CAPABILITY, parse_switches, set_parameters, split_pairs
from corefw.errors import MigfwError, UsageError, one_line
from corefw.hosting.background import Background, NotStarted, Started, go_to_background
from corefw.qmp.address import runtime_directory
from corefw.qmp.engines import claim

if TYPE_CHECKING:
    from corefw.settings import Settings

DEFER: Final = "defer"
PRIVATE: Final = "private"
PROPERTY: Final = "--property NAME=on or --property NAME=off"


@click.command(cls=WithInstalled)
@click.argument("program", required=False, shell_complete=complete_programs)
@click.option(
    "--machine",
    "kind",
    metavar="KIND",
    shell_complete=complete_machines,
    default="python",
    show_default=True,
    help="Kind of guest.",
)
@click.option(
    "--opt", "opts", metavar="NAME=VALUE", multiple=True, help="Set an option of the program or machine. Repeatable."
)
@click.option("--name", metavar="NAME", help="Name the engine, for --name in other commands.  [default: from PROGRAM]")
@click.option(
    "--qmp",
    metavar="ADDRESS",
    shell_complete=complete_addresses,
    help="Listen for QMP at unix:PATH or tcp:HOST:PORT instead of the default socket. Anyone who can reach a tcp:"
    " address controls the engine.",
)
@click.option(
    "--incoming",
    metavar="URI",
    shell_complete=complete_incoming,
    help="Wait for a guest to migrate here. 'private': at a UNIX socket of the engine that only you can dial."
    " 'defer': first wait for the QMP command migrate-incoming.",
)
@settings_options
@click.option(
    "--property",
    "properties",
    metavar="NAME=on|off",
    multiple=True,
    shell_complete=complete_properties,
    help="Set a machine property: send-configuration, send-section-footer, store-global-state, ... Repeatable.",
)
@click.option("--only-migratable", is_flag=True, help="Refuse a guest that could not migrate.")
@click.option(
    "--allow-any-user",
    is_flag=True,
    help="Let every user of this host migrate in through --incoming unix:@NAME, not only you and root.",
)
@click.option(
    "--allow-undeclared", is_flag=True, help="Let the guest migrate even if undeclared state would be left behind."
)
@click.option("--paused", is_flag=True, help="Do not start the guest; start it later with 'migfw cont'.")
@click.option(
    "--detach",
    is_flag=True,
    help="Run in the background once the engine is ready. 'migfw status' shows where its log is.",
)
@click.option("--json", "as_json", is_flag=True, help="With --detach: print one JSON document about the engine.")
@click.option(
    "--tied",
    metavar="TOKEN",
    hidden=True,
    help="With --detach: end if stdin ends before the engine is ready. TOKEN marks the process for its starter.",
)
@click.option("--stay", is_flag=True, help="Keep the engine after the guest has left, or failed to arrive.")
def run(
    program: str | None,
    kind: str,
    opts: tuple[str, ...],
    name: str | None,
    qmp: str | None,
    incoming: str | None,
    caps: tuple[str, ...],
    params: tuple[str, ...],
    properties: tuple[str, ...],
    only_migratable: bool,
    allow_any_user: bool,
    allow_undeclared: bool,
    paused: bool,
    detach: bool,
    as_json: bool,
    tied: str | None,
    stay: bool,
) -> None:
    """Run PROGRAM as a guest that can migrate, or wait for one to migrate here.

    PROGRAM is FILE.py:CLASS, PACKAGE.MODULE:CLASS, or the name of a bundled program (stress, life). A destination needs
    the same PROGRAM and options as the source. The engine runs until the guest ends or has moved, or until 'migfw quit'
    or Ctrl-C. It prints one line on stdout when it is ready; with --incoming the line shows the address, so you can use
    port 0.

    \b
    Examples:
      migfw run heat.py:Heat
      migfw run stress --opt ram=1G --opt dirty-rate=100M
      migfw run heat.py:Heat --detach
      migfw run heat.py:Heat --incoming tcp:0.0.0.0:4444
      migfw run --machine qemu --incoming unix:/tmp/vm.sock

    \b
    Exit status:
      0    the guest ended or has moved, or 'migfw quit'
      1    the guest failed, or could not be loaded
      2    wrong usage; nothing was started
      130  Ctrl-C
    """
    if as_json and not detach:
        raise UsageError("--json needs --detach: without it the engine stays in the foreground and prints lines")
    background = _detach(as_json=as_json, tied=tied is not None) if detach else None
    with LeavingAtOnce():
        from corefw.engine import Engine, Launch
        from corefw.hosting.process import Ending, EngineProcess, Output, Plan, ending_signals
        from corefw.machine import MachineConfig
        from corefw.plugins import Plugins
        from corefw.qmp.server import QmpServer

    options = split_pairs(opts, "--opt NAME=VALUE, as in --opt ram=1G")
    with LeavingAtOnce():
        plugins = Plugins.load()
    settings = plugins.settings()
    flags = {"only-migratable": only_migratable, "allow-any-user": allow_any_user}
    switched = parse_switches(properties, PROPERTY) | {name: True for name, on in flags.items() if on}
    _apply(settings, caps, params, switched)
    deferred = incoming == DEFER
    if incoming not in (None, DEFER, PRIVATE):
        plugins.transport(incoming, settings).check_incoming()
    # Until the engine handles signals itself, let the others unwind and clean up as Ctrl-C does. Not earlier: an import
    # may swallow a KeyboardInterrupt.
    for number in set(ending_signals()) - {signal.SIGINT}:
        signal.signal(number, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        claimed = stack.enter_context(claim(name, qmp, program or kind))
        if incoming == PRIVATE:
            incoming = f"unix:{runtime_directory() / claimed.name}.in"
        log = background.redirect(claimed.name) if background is not None else None
        config = MachineConfig(
            program,
            options,
            incoming=incoming is not None,
            allow_undeclared=allow_undeclared,
            only_migratable=settings.property("only-migratable"),
        )
        machine = plugins.machine(kind, config)
        stack.callback(machine.close)
        launch = Launch(kind, program, options, switched, str(Path.cwd()), allow_undeclared, str(log) if log else None)
        engine = Engine(machine, plugins, settings, name=claimed.name, autostart=not paused, launch=launch)
        stack.callback(engine.close)

        def listen() -> QmpServer:
            server = stack.enter_context(QmpServer(engine, claimed.address))
            claimed.close()
            return server

        plan = Plan(None if deferred else incoming, deferred, paused, stay, background)
        if EngineProcess(engine, claimed.address, plan, Output(announce, note)).run(listen) is Ending.INTERRUPTED:
            raise Finished(ExitStatus.INTERRUPTED)


def _detach(*, as_json: bool, tied: bool) -> Background:
    """Fork, and return in the child. In the parent, print what became of the child and raise Finished or MigfwError."""
    match go_to_background(tied=tied):
        case Background() as background:
            return background
        case Started(line, facts):
            if as_json:
                print_json(facts)
            else:
                click.echo(f"migfw: {one_line(line)}")
            raise Finished(ExitStatus.DONE)
        case NotStarted(interrupted=True):
            note("interrupted; nothing was started")
            raise Finished(ExitStatus.INTERRUPTED)
        case NotStarted(status, output):
            click.echo(output, nl=False, err=status != 0)
            if status < 0:
                ended_by = signal.Signals(-status).name
                raise MigfwError(f"the engine was ended by {ended_by} before it was ready")
            raise click.exceptions.Exit(status)


def _apply(
    settings: Settings,
    caps: Iterable[str],
    params: Iterable[str],
    properties: Mapping[str, bool],
) -> None:
    """Apply the settings on the command line. Raises UsageError."""
    for name, state in properties.items():
        settings.set_property(name, state)
    set_parameters(settings, params)
    settings.set_capabilities(parse_switches(caps, CAPABILITY))
