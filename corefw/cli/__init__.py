"""The command line.

The only package that imports all the others. Modules are imported when a command needs them: `migfw --help` loads click
and the table of commands, but neither NumPy nor a plugin.

    group.py        `migfw` itself and the table of its commands
    console.py      stdout, stderr, and how an exception becomes a message and an exit status
    signals.py      what Ctrl-C does
    options.py      options that several commands share; how --cap and --param are read and applied
    completion.py   Tab completion
    engines.py      find an engine and talk to it over QMP; claim the name of a new one
    progress.py     follow a migration, show its progress, sum it up
    control.py      the commands that send a single QMP command each, and `ps`
    run.py          `run`: hosting.py is the life of the engine's process, background.py runs it detached
    migrate.py      `migrate` and `check`: destination.py starts the other side over ssh
    relay.py        `relay`, and how a real QEMU migrates over a transport that it does not support

Each of the others is a command of that name.
"""

from __future__ import annotations

import os

from corefw.cli.signals import leave_at_once

leave_at_once()


def main() -> int:
    """Run `migfw` and return the exit status. This is the entry point of the script."""
    from corefw.cli.console import open_streams, run_command
    from corefw.cli.group import migfw

    if "_MIGFW_COMPLETE" in os.environ:  # a shell asks for completions
        from corefw.cli.completion import register_shells

        register_shells()
    open_streams()
    return run_command(lambda: migfw.main(prog_name="migfw", standalone_mode=False))
