"""Engine.check(): what no command line can bring about."""

from __future__ import annotations

import pytest

from corefw.engine import checking
from tests.helpers.engines import Pair, counting, ended, runs_on


def test_a_blocker_is_a_problem(pair: Pair) -> None:
    source = pair.source()
    source.add_blocker("it is attached to a device")
    found = source.check()
    assert (found["ok"], found["problems"]) == (False, ["it is attached to a device"])


def test_a_host_without_room_is_a_problem(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = pair.destination()
    uri = destination.migrate_incoming("tcp:127.0.0.1:0")
    source = pair.source()
    monkeypatch.setattr(checking, "spare_memory", lambda: 4096)
    [problem] = source.check(uri)["problems"]
    assert problem.startswith("the destination: the guest has ")
    assert problem.endswith("and this host has 4.0 KiB to spare")


def test_properties_that_differ_are_a_problem(pair: Pair) -> None:
    destination = pair.destination(properties={"send-section-footer": False})
    source = pair.source()
    [problem] = source.check(destination.migrate_incoming("tcp:127.0.0.1:0"))["problems"]
    assert problem == "the destination: property send-section-footer is off here and has to be alike on both sides"


def test_a_stopped_guest_is_checked_without_its_dirty_rate(pair: Pair) -> None:
    found = pair.source(running=False).check()
    assert (found["ok"], found["dirty-rate"]) == (True, None)
    assert "cannot be measured" in found["notes"][0]


def test_no_write_is_lost_by_checks_before_a_migration(pair: Pair) -> None:
    destination = pair.destination()
    uri = destination.migrate_incoming("tcp:127.0.0.1:0")
    source = pair.source()
    for _ in range(2):
        assert source.check(uri)["ok"]
    source.migrate(uri)
    assert ended(source) == "completed"
    assert counting(destination).run_state == "running"
    runs_on(destination)
