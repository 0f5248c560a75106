"""What Ctrl-C does while there is nothing to undo: it ends the process at once, without a word.

An exception instead would end in a traceback while modules are imported or the interpreter ends, or be swallowed by a
module that catches what it does not know. Imports next to nothing, for it has to be in place early.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType


def _leave(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


def leave_at_once() -> None:
    """From now on Ctrl-C ends this process, status 130. Nothing happens where the process is not `migfw` itself, or
    SIGINT is ignored or somebody else's."""
    if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again: there may be something to undo."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class LeavingAtOnce:
    """`with LeavingAtOnce():` around the imports of a command that has made nothing yet."""

    def __enter__(self) -> None:
        leave_at_once()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise_interrupts()


def _is_program() -> bool:
    """Whether this process is `migfw`, or `python -m corefw.cli`, and not a program that uses the package."""
    started = sys.argv[0] if sys.argv else ""
    return os.path.basename(started) in ("migfw", "__main__.py") or (  # noqa: PTH119 - pathlib takes long to import
        started == "-m" and "corefw.cli" in sys.orig_argv
    )
