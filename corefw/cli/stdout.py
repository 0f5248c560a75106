"""Standard output, and what happens when it cannot be written to.

The law: there is one that can be written to, whatever the command was started with; a closed one is the null device. A
write that fails is a StdoutError here, once; from then on the null device takes what comes. A reader that went away is
no such failure, but a BrokenPipeError (see outcome.py).
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from corefw.errors import MigfwError


class StdoutError(MigfwError):
    """What was to be said on stdout is lost."""

    def __init__(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        super().__init__(f"cannot write to stdout: {reason[:1].lower()}{reason[1:]}")


class Failure:
    """The first StdoutError of a while in which none is raised; None where there was none."""

    error: StdoutError | None = None

    def before(self, text: str) -> str:
        """`text`, behind what failed."""
        return f"{self.error}; {text}" if self.error else text


class _Stdout(io.FileIO):
    """The descriptor. While something has to go on whoever reads of it, `forgiving` keeps what fails."""

    forgiving: Failure | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            abandon(self.fileno())
            failed = StdoutError(error)
        if _Stdout.forgiving is None:
            raise failed
        _Stdout.forgiving.error = failed
        return memoryview(data).nbytes


def open_streams() -> None:
    """At the start of the process: see to all three."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - it is open as long as the process
    sys.stderr = sys.stderr or open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    before = sys.stdout
    if before is not None and before is not sys.__stdout__:
        return  # somebody collects what is said
    raw = _Stdout(1, "wb", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else None,
        errors=before.errors if before else None,
        line_buffering=before.line_buffering if isinstance(before, io.TextIOWrapper) else False,
    )


@contextmanager
def unread_is_fine() -> Iterator[Failure]:
    """Something goes on that must not end because it cannot be told of. Say in the end what failed."""
    _Stdout.forgiving = failure = Failure()
    try:
        yield failure
    except MigfwError as error:
        if failure.error is None:
            raise
        raise MigfwError(failure.before(str(error))) from error
    finally:
        _Stdout.forgiving = None


def abandon(fd: int) -> None:
    """Nobody reads it any more. What is still in the buffer, and what comes, goes nowhere and without complaint."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, fd)
    os.close(nowhere)
