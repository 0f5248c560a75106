"""The command line; the only place where everything meets.

Invariant: one room for each concern, and nothing is imported before a command needs it. `migfw --help` loads click and
the table of commands, neither NumPy nor a plugin.

    group.py      the table of commands, their lazy loading, --help, --version, --verbose
    outcome.py    how a command ended -> one line on stderr and the exit status; nobody else decides either
    options.py    options that several commands share, and how their values are written
    output.py     what goes to stdout: JSON documents, tables, lines
    stdout.py     where that goes, and what happens when it cannot be written
    completion.py what Tab completes, and the shells' scripts
    leaving.py    what Ctrl-C does as long as there is nothing to undo
    engines.py    the engine that a command talks to over QMP: migfw's own, or a QEMU
    the rest      one module for each command, or for a family of small ones
"""

from __future__ import annotations

import os

from corefw.cli.leaving import leave_at_once

leave_at_once()


def main() -> int:
    """The entry point of `migfw`; returns the exit status."""
    from corefw.cli.group import migfw
    from corefw.cli.outcome import outcome
    from corefw.cli.stdout import open_streams

    if "_MIGFW_COMPLETE" in os.environ:  # a shell asks what may follow
        from corefw.cli.completion import register_shells

        register_shells()
    open_streams()
    return outcome(lambda: migfw.main(prog_name="migfw", standalone_mode=False))
