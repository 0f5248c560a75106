from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.peers import find_peer, peer_parameters, using_peer
from tests.helpers.qemu import Guest, assemble, temporary_folder

EVERY_QEMU = peer_parameters("5.2", "7.2", "10.0", "newest")
NONE_OF_THEM = all(find_peer(label) is None for label in ("5.2", "7.2", "10.0", "newest"))


@pytest.fixture(params=[*EVERY_QEMU, *(["PATH"] if NONE_OF_THEM else [])])
def every_qemu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once with each installed QEMU; skip those that are missing, naming `make peers`."""
    with using_peer(request.param):
        yield request.param


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    return assemble(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def folder() -> Iterator[Path]:
    with temporary_folder() as path:
        yield path
