from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose paths are short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="mz", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)
