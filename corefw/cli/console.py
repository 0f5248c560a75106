"""Standard output, standard error and the exit status of a command.

Three guarantees:

- Stdout can always be written to. If it was closed when the command started, it is the null device. If a write fails,
  StdoutError is raised once, and everything after that goes to the null device. A reader that closes its end of the
  pipe is not such a failure: that raises BrokenPipeError.
- With --json, stdout gets exactly one document; without, plain text that needs no terminal, one fact a line.
- Only `run_command` turns exceptions into messages and exit statuses. Any exception other than MigfwError and click's
  is a bug and keeps its traceback.

    0     success
    1     the operation failed; one line on stderr says why
    2     wrong usage; nothing was started or changed
    130   Ctrl-C
    141   the reader of stdout closed its end (as a shell reports SIGPIPE)
"""

from __future__ import annotations

import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import click

from corefw.errors import MigfwError, UsageError, one_line

# -- what a command prints -------------------------------------------------------------------------------------------


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(document, indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns that are as wide as their content; the last one is not padded."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings) - 1)]
    for row in (headings, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print lines of "name: value" with the values aligned."""
    width = max((len(name) for name, _ in facts), default=0) + 2
    for name, value in facts:
        click.echo(f"{name + ':':<{width}}{one_line(value)}")


def note(text: str) -> None:
    """Print one line on stderr. Ignores a stderr that cannot be written to."""
    try:
        click.echo(f"migfw: {one_line(text)}", err=True)
    except OSError:
        return


def announce(text: str) -> None:
    """Print one line on stdout for a process that must not end because it cannot print."""
    try:
        click.echo(f"migfw: {one_line(text)}")
    except BrokenPipeError:
        discard_output(sys.stdout.fileno())
    except StdoutError as error:
        note(str(error))


# -- how a command ends ------------------------------------------------------------------------------------------------


class ExitStatus(IntEnum):
    """The exit statuses of `migfw`."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class Finished(click.exceptions.Exit):
    """Raised by a command that has already printed everything, to end with this status."""

    def __init__(self, status: ExitStatus) -> None:
        super().__init__(int(status))


def run_command(command: Callable[[], object]) -> int:
    """Run the command line, print its error if there is one, and return the exit status."""
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
    """Run a command's body. Ctrl-C becomes status 130 and a closed pipe on stdout becomes 141, without a message."""
    try:
        result = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise Finished(ExitStatus.INTERRUPTED) from None
    except BrokenPipeError as error:
        if not _stdout_is_gone():
            raise AssertionError("a broken pipe that was not translated to a MigfwError") from error
        discard_output(sys.stdout.fileno())
        raise Finished(ExitStatus.BROKEN_PIPE) from None
    return result


def _stdout_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


# -- stdout ------------------------------------------------------------------------------------------------------------


class StdoutError(MigfwError):
    """A write to stdout failed, and its output is lost."""

    def __init__(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        super().__init__(f"cannot write to stdout: {reason[:1].lower()}{reason[1:]}")


class Failure:
    """The first StdoutError that `unread_is_fine` kept from being raised; `error` is None if there was none."""

    error: StdoutError | None = None

    def before(self, text: str) -> str:
        """`text`, after the error if there was one."""
        return f"{self.error}; {text}" if self.error else text


class _Stdout(io.FileIO):
    """Standard output's descriptor. If `forgiving` is set, failures are stored there instead of being raised."""

    forgiving: Failure | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            discard_output(self.fileno())
            failed = StdoutError(error)
        if _Stdout.forgiving is None:
            raise failed
        _Stdout.forgiving.error = failed
        return memoryview(data).nbytes


def open_streams() -> None:
    """Make sure that stdin, stdout and stderr exist. Called once, when the process starts."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is `fd`
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - open as long as the process lives
    sys.stderr = sys.stderr or open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    before = sys.stdout
    if before is not None and before is not sys.__stdout__:
        return  # redirected by the caller
    raw = _Stdout(1, "wb", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else None,
        errors=before.errors if before else None,
        line_buffering=before.line_buffering if isinstance(before, io.TextIOWrapper) else False,
    )


@contextmanager
def unread_is_fine() -> Iterator[Failure]:
    """Keep running although stdout cannot be written to: a guest or a migration depends on this process.

    The caller reports the failure at the end. A MigfwError that the block raises is reported together with it.
    """
    _Stdout.forgiving = failure = Failure()
    try:
        yield failure
    except MigfwError as error:
        if failure.error is None:
            raise
        raise MigfwError(failure.before(str(error))) from error
    finally:
        _Stdout.forgiving = None


def discard_output(fd: int) -> None:
    """Send everything that is written to `fd` from now on, buffered data included, to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, fd)
    os.close(nowhere)
