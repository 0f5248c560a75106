"""The compiled library, and what its functions return."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

LIBRARY: Final = ctypes.CDLL(str(Path(__file__).with_name("kernel.so")))

WRONG: Final = -1
"""What a function returns for numbers that do not fit."""


def check(error: int, what: Callable[[], str]) -> None:
    """Raise ValueError, with `what`, for WRONG, and OSError for an errno."""
    if error == WRONG:
        raise ValueError(what())
    if error:
        raise OSError(error, os.strerror(error))
