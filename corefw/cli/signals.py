"""What Ctrl-C and SIGTERM do, in a command's three states.

- While there is nothing to undo (importing, parsing the command line), Ctrl-C ends the process at once. Raising an
  exception there would print a traceback from inside an import or from the interpreter's shutdown, or be swallowed by a
  module that catches every exception.
- While a command has something to undo, Ctrl-C raises KeyboardInterrupt, as Python does by default.
- `Interrupts` defers the signal: the command checks a flag at a convenient point.

This module is imported before everything else, so it imports as little as possible.
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
    """Defers Ctrl-C and SIGTERM: the first one sets `requested`, a second one raises KeyboardInterrupt.

    Use it as a context manager in the main thread, and check `requested` regularly.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _DEFERRED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def ending_signals() -> tuple[signal.Signals, ...]:
    """Signals that end an engine cleanly: SIGINT, SIGTERM, and SIGHUP unless it is ignored (nohup)."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)
