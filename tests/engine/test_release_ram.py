"""The source gives its memory back in postcopy (release-ram), but never the only copy of a page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from corefw.testing.tasks import wait_until
from tests.helpers.cutting import Cut, CutProxy
from tests.helpers.engines import Pair
from tests.helpers.moving import LISTEN, Move
from tests.helpers.ram import allocated

PAGES = (32 << 20) // 4096


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    made = Move(pair)
    made.source.set_capabilities({"release-ram": True})
    yield made


def held(move: Move) -> int:
    """Pages that the source's kernel holds for the guest's RAM."""
    return allocated(move.source.machine.ram_blocks()[0])


@pytest.mark.parametrize("preempt", [False, True])
def test_the_source_shrinks_while_it_sends(move: Move, preempt: bool) -> None:
    for engine in (move.source, move.destination):
        engine.set_capabilities({"postcopy-preempt": preempt})
    assert held(move) == PAGES
    move.switch()
    assert wait_until(lambda: 0 < held(move) <= PAGES * 3 // 4), "nothing was given back"
    assert move.source.outgoing.status == "postcopy-active"
    move.hurry()
    move.completes()
    assert held(move) == 0


def test_nothing_is_lost_when_the_connection_breaks(move: Move) -> None:
    with CutProxy(move.destination.migrate_incoming(LISTEN)) as proxy:
        move.limit()
        move.source.migrate(proxy.uri)
        move.source.start_postcopy()
        for _ in range(2):
            move.reaches(move.source, "postcopy-active")
            move.reaches(move.destination, "postcopy-active")
            before = held(move)
            assert wait_until(lambda: held(move) < before), "nothing was given back"  # noqa: B023 - not kept
            proxy.cut(Cut.RESET)
            move.reaches(move.source, "postcopy-paused")
            move.reaches(move.destination, "postcopy-paused")
            proxy.lead_to(move.destination.recover(LISTEN))
            move.source.migrate(proxy.uri, resume=True)
        move.hurry()
        move.completes()
