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

from corefw.cli import LeavingAtOnce, completion, ending_signals
from corefw.cli.background import go_to_background
from corefw.cli.completion import WithInstalled
from corefw.cli.options import CAPABILITY, parse_switches, set_parameters, settings_options, split_pairs
from corefw.errors import UsageError
from corefw.qmp.address import runtime_directory
from corefw.qmp.engines import claim

if TYPE_CHECKING:
    from corefw.settings import Settings

DEFER: Final = "defer"
PRIVATE: Final = "private"
PROPERTY: Final = "--property NAME=on or --property NAME=off"


@click.command(cls=WithInstalled)
@click.argument("program", required=False, shell_complete=completion.programs)
@click.option(
    "--machine",
    "kind",
    metavar="KIND",
    shell_complete=completion.machines,
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
    shell_complete=completion.addresses,
    help="Listen for QMP at unix:PATH or tcp:HOST:PORT instead of the default socket. Anyone who can reach a tcp:"
    " address controls the engine.",
)
@click.option(
    "--incoming",
    metavar="URI",
    shell_complete=completion.incoming,
    help="Wait for a guest to migrate here. 'private': at a UNIX socket of the engine that only you can dial."
    " 'defer': first wait for the QMP command migrate-incoming.",
)
@settings_options
@click.option(
    "--property",
    "properties",
    metavar="NAME=on|off",
    multiple=True,
    shell_complete=completion.properties,
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
    background = go_to_background(as_json=as_json, tied=tied is not None) if detach else None
    with LeavingAtOnce():
        from corefw.cli.hosting import Plan, host
        from corefw.engine import Engine, Launch
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

        host(engine, claimed.address, listen, Plan(None if deferred else incoming, deferred, paused, stay, background))


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
