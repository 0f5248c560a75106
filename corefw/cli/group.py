"""`migfw` itself and the table of its commands.

The table names where each command lives and has its line of help. A command's module is imported when the command runs
or its own help is asked for. What all commands share (--verbose, a clean end after Ctrl-C) is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final, NamedTuple

import click

from corefw import __version__
from corefw.cli import leave_at_once, raise_interrupts
from corefw.cli.console import ExitStatus, Finished, guarded


class Entry(NamedTuple):
    """Where a command lives ("module:object"), and its line in `migfw --help`."""

    target: str
    help: str


COMMANDS: Final[Mapping[str, Mapping[str, Entry]]] = {
    "Guests": {
        "run": Entry("corefw.cli.run:run", "Run a guest, or wait for one to migrate here."),
        "demo": Entry("corefw.cli.demo:demo", "Move a running guest between two processes and verify it."),
        "stop": Entry("corefw.cli.control:stop", "Stop the guest."),
        "cont": Entry("corefw.cli.control:cont", "Resume a stopped guest."),
        "verify": Entry("corefw.cli.control:verify", "Ask the guest to check its own state."),
        "quit": Entry("corefw.cli.control:quit_engine", "End the engine and its guest."),
    },
    "Migration": {
        "migrate": Entry("corefw.cli.migrate:migrate", "Move the running guest to another host."),
        "check": Entry("corefw.cli.status:check", "Check whether the guest could move, and how long it would take."),
        "status": Entry("corefw.cli.status:status", "Show the guest and its migration."),
        "cancel": Entry("corefw.cli.control:cancel", "Cancel the migration; the guest keeps running here."),
        "set": Entry("corefw.cli.control:set_values", "Change capabilities and parameters, even during a migration."),
        "continue": Entry("corefw.cli.control:continue_migration", "Complete a migration in pre-switchover."),
        "postcopy": Entry("corefw.cli.control:postcopy", "Switch to postcopy now."),
        "pause": Entry("corefw.cli.control:pause", "Pause a postcopy migration, to recover it later."),
        "recover": Entry("corefw.cli.control:recover", "On the destination, wait for a broken postcopy to resume."),
    },
    "Tools": {
        "ps": Entry("corefw.cli.control:ps", "List your engines on this host."),
        "plugins": Entry("corefw.cli.installed:plugins", "List the installed plugins, and what failed to load."),
        "inspect": Entry("corefw.cli.streams:inspect", "Show what is in a recorded migration stream."),
        "convert": Entry("corefw.cli.streams:convert", "Rewrite a stored stream for another machine type or QEMU."),
        "relay": Entry("corefw.cli.streams:relay", "Forward a migration from one transport to another."),
        "qmp": Entry("corefw.cli.control:qmp", "Send one QMP command and print the answer."),
        "completion": Entry("corefw.cli.installed:completion", "Print the Tab completion script for a shell."),
    },
}

_ENTRIES: Final[dict[str, Entry]] = {name: entry for part in COMMANDS.values() for name, entry in part.items()}


class LazyGroup(click.Group):
    """A group that imports a command when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_ENTRIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _ENTRIES.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        command.short_help = entry.help
        if not any(parameter.name == "verbose" for parameter in command.params):
            command.params.append(_verbose_option())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, entries in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, entry.help) for name, entry in entries.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return guarded(lambda: super(LazyGroup, self).invoke(ctx))
        except click.UsageError as error:
            if error.ctx is None and ctx.invoked_subcommand in _ENTRIES:
                # click's parser does not say which command the option belongs to.
                command = self.get_command(ctx, ctx.invoked_subcommand)
                assert command is not None
                error.ctx = click.Context(command, info_name=ctx.invoked_subcommand, parent=ctx)
            raise
        finally:
            leave_at_once()

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the command's module. From here on Ctrl-C raises, because the command may have something to undo."""
        if args[0] not in _ENTRIES and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}'{_suggestion(args[0])}")
        found = super().resolve_command(ctx, args)
        raise_interrupts()
        return found


def _suggestion(word: str) -> str:
    """The end of an error message that names similar commands, or ""."""
    from difflib import get_close_matches

    similar = get_close_matches(word, _ENTRIES)
    return f": did you mean {' or '.join(repr(name) for name in similar)}?" if similar else ""


def _verbose_option() -> click.Option:
    return click.Option(
        ["-v", "--verbose"],
        count=True,
        expose_value=False,
        callback=_set_verbosity,
        help="Log progress to stderr; -vv logs everything.",
    )


def _set_verbosity(ctx: click.Context, _parameter: click.Parameter, count: int) -> None:
    """Set the log level. `migfw -v run stress` and `migfw run stress -v` are the same: the counts are added up."""
    import logging

    total = ctx.meta["migfw.verbosity"] = ctx.meta.get("migfw.verbosity", 0) + count
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(total, 2)]
    plain, detailed = "migfw: %(message)s", "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, format=detailed if total else plain, force=True)
    # migfw reports plugins that fail to load itself.
    logging.getLogger("stevedore").setLevel(logging.DEBUG if total > 1 else logging.CRITICAL)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[_verbose_option()],
    epilog="Run 'migfw COMMAND --help' for the options and examples of a command.",
)
@click.version_option(__version__, message="migfw %(version)s")
@click.pass_context
def migfw(ctx: click.Context) -> None:
    """Move running guests between hosts while they run.

    \b
    A guest is a Python program, or a virtual machine from QEMU.
      migfw run heat.py:Heat                               run a program as a guest
      migfw run heat.py:Heat --incoming tcp:0.0.0.0:4444   wait for it, on the other host
      migfw migrate tcp:other.example.org:4444             move it there while it runs
      migfw demo                                           see it work on this host
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        raise Finished(ExitStatus.USAGE)
