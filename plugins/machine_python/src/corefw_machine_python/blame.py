"""Describes an exception by its place in the user's code, leaving out the frames of this package."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType

from corefw.errors import MigfwError, one_line


def describe(error: BaseException) -> str:
    """Describe an error in one line: "ZeroDivisionError: division by zero (heat.py, line 12, in tick)"."""
    text = one_line(traceback.format_exception_only(error)[-1])
    frames = traceback.extract_tb(_from_users_code(error))
    if not frames:
        return text
    last = next((frame for frame in reversed(frames) if not _is_ours(frame.filename)), frames[-1])
    return f"{text} ({Path(last.filename).name}, line {last.lineno}, in {last.name})"


def traceback_of(error: BaseException) -> str:
    """The traceback from the user's first line to the user's last line; "" if the user's code raised nothing."""
    if isinstance(error, MigfwError):
        return traceback_of(error.__cause__) if error.__cause__ is not None else ""
    lines = traceback.TracebackException(type(error), error, _from_users_code(error))
    while len(lines.stack) > 1 and _is_ours(lines.stack[-1].filename):
        lines.stack.pop()
    return "".join(lines.format())


def _from_users_code(error: BaseException) -> TracebackType | None:
    """The traceback without this package's frames at its beginning; the last frame always stays."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _is_ours(file: str) -> bool:
    """Whether this is a module of this package: if a field refuses a value, the mistake is in the caller."""
    return Path(file).parent == Path(__file__).parent
