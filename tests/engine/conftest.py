from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.plugins import Plugins
from tests.helpers.engines import Pair


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="eng", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def pair(plugins: Plugins) -> Iterator[Pair]:
    with Pair(plugins) as pair:
        yield pair
