from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.peers import find_peer, peer_parameters, using_peer

EVERY_QEMU = peer_parameters("5.2", "7.2", "10.0", "newest")
NONE_OF_THEM = all(find_peer(label) is None for label in ("5.2", "7.2", "10.0", "newest"))


@pytest.fixture(params=[*EVERY_QEMU, *(["PATH"] if NONE_OF_THEM else [])])
def every_qemu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once with each QEMU that is here; those that are missing are skipped and name `make peers`."""
    with using_peer(request.param):
        yield request.param
