"""The command line.

The only package that imports all the others. Modules are imported when a command needs them: `migfw --help` loads click
and the table of commands, but neither NumPy nor a plugin.

    group.py        `migfw` itself and the table of its commands
    console.py      stdout, stderr, and how an exception becomes a message and an exit status
    options.py      options that several commands share; Tab completion of their values
    display.py      what is shown while a command runs, live or as lines
    run.py          `run`; corefw.hosting has the life of the engine's process
    migrate.py      `migrate`; corefw.client has what it does with the engine and on the other host
    status.py       the commands that only look: `status`, `check`
    control.py      the commands that send a single QMP command each, `qmp` and `ps`
    streams.py      the commands that need only a stream: `inspect`, `convert`, `relay`
    installed.py    `plugins`, `completion`
    demo.py         `demo`

Ctrl-C and SIGTERM mean something else in each of a command's three states:

- While there is nothing to undo (importing, parsing the command line), Ctrl-C ends the process at once. Raising an
  exception there would print a traceback from inside an import or from the interpreter's shutdown, or be swallowed by a
  module that catches every exception.
- While a command has something to undo, Ctrl-C raises KeyboardInterrupt, as Python does by default.
- `Interrupts` defers the signal: the command checks a flag at a convenient point.

This file is executed before everything else, so it imports as little as possible.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Final, Self

_DEFERRED: Final = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Run `migfw` and return the exit status. This is the entry point of the script."""
    from corefw.cli.console import open_streams, run_command
    from corefw.cli.group import migfw

    if "_MIGFW_COMPLETE" in os.environ:  # a shell asks for completions
        from corefw.cli.installed import register_shells

        register_shells()
    open_streams()
    return run_command(lambda: migfw.main(prog_name="migfw", standalone_mode=False))


# -- signals -----------------------------------------------------------------------------------------------------------


def leave_at_once() -> None:
    """Make Ctrl-C end this process with status 130. Does nothing if the process is not `migfw` itself, or if SIGINT is
    ignored or handled by other code."""
    if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_interrupts() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again: there may be something to undo."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


def _is_program() -> bool:
    """Whether this process is `migfw` or `python -m corefw.cli`, and not a program that uses the package."""
    started = sys.argv[0] if sys.argv else ""
    return os.path.basename(started) in ("migfw", "__main__.py") or (  # noqa: PTH119 - pathlib takes long to import
        started == "-m" and "corefw.cli" in sys.orig_argv
    )


class LeavingAtOnce:
    """`with LeavingAtOnce():` around the imports of a command that has not created anything yet."""

    def __enter__(self) -> None:
        leave_at_once()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise_interrupts()


class Interrupts:
    """Defers Ctrl-C and SIGTERM: after the first one, `received()` is true; a second one raises KeyboardInterrupt.

    Use it as a context manager in the main thread, and check `received()` regularly.
    """

    def __init__(self) -> None:
        self._received = False

    def received(self) -> bool:
        return self._received

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _DEFERRED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = True


leave_at_once()
