"""Runs of pages as page numbers, to compare them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pages_of(runs: NDArray[np.int64]) -> list[int]:
    """Rows (first, end), `end` exclusive -> page numbers."""
    return [page for first, end in runs.tolist() for page in range(first, end)]
