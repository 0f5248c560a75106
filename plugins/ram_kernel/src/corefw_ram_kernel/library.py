"""The compiled library, and what its functions return."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

_PATH: Final = str(Path(__file__).with_name("kernel.so"))
LIBRARY: Final = ctypes.CDLL(_PATH)
QUICK: Final = ctypes.PyDLL(_PATH)
"""The same for functions so short that they keep the interpreter lock: to get it back may take longer."""

WRONG: Final = -1
"""What a function returns for numbers that do not fit."""


def check(error: int, what: Callable[[], str]) -> None:
    """Raise ValueError, with `what`, for WRONG, and OSError for an errno."""
    if error == WRONG:
        raise ValueError(what())
    if error:
        raise OSError(error, os.strerror(error))
