"""How a command ends: one line on stderr, and the exit status.

The law: this is the only place that turns an exception into words and a number. Whatever is not a MigfwError, and not
click's, is a bug and keeps its traceback.

    0     done
    1     the operation failed; the line says why
    2     wrong usage; nothing was started or changed
    130   Ctrl-C
    141   whoever read stdout went away (as a shell reports SIGPIPE)
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from enum import IntEnum

import click

from corefw.cli.stdout import abandon
from corefw.errors import MigfwError, UsageError, one_line


class ExitStatus(IntEnum):
    """What the shell sees."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class Finished(click.exceptions.Exit):
    """Raised by a command that has said everything already: end with this status, without another word."""

    def __init__(self, status: ExitStatus) -> None:
        super().__init__(int(status))


def note(text: str) -> None:
    """One line for the person at the terminal, on stderr; lost in silence where nobody reads that."""
    try:
        click.echo(f"migfw: {one_line(text)}", err=True)
    except OSError:
        return


def outcome(command: Callable[[], object]) -> int:
    """Run the command line and return its exit status."""
    try:
        ended = command()
    except click.Abort:
        return ExitStatus.INTERRUPTED
    except click.ClickException as error:
        note(_in_one_line(error))
        return error.exit_code
    except MigfwError as error:
        note(str(error))
        return ExitStatus.USAGE if isinstance(error, UsageError) else ExitStatus.FAILED
    return ended if isinstance(ended, int) else ExitStatus.DONE


def _in_one_line(error: click.ClickException) -> str:
    """Click's message without its usage block, and where to read more."""
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None) or click.get_current_context(silent=True)
    path = context.command_path if isinstance(context, click.Context) else "migfw"
    return f"{text} (see '{path} --help')" if isinstance(error, click.UsageError) else text


def guarded(command: Callable[[], object]) -> object:
    """Run a command's body: Ctrl-C becomes 130, a reader of stdout that went away becomes 141, both without noise."""
    try:
        result = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise Finished(ExitStatus.INTERRUPTED) from None
    except BrokenPipeError as error:
        if not _stdout_is_gone():
            raise AssertionError("a broken pipe that nobody translated") from error
        abandon(sys.stdout.fileno())
        raise Finished(ExitStatus.BROKEN_PIPE) from None
    return result


def _stdout_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
