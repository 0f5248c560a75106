"""A guest moves, with each way of framing the stream."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from corefw.control import PassBegan
from corefw.errors import BlockedError, SettingsError, StateError, UriError, UsageError
from corefw.machine import RunState
from corefw.states import MigrationStatus
from tests.helpers.engines import PATIENCE, Pair, arrived, counting, ended, query_migrate, runs_on
from tests.helpers.machines import COUNTER, CountingMachine


def test_a_running_guest_moves_and_loses_nothing(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    uri = destination.migrate_incoming("tcp:127.0.0.1:0")
    source.migrate(uri)
    assert ended(source) == "completed" and arrived(destination) == "completed"
    assert source.machine.run_state is RunState.POSTMIGRATE
    assert pair.statuses("completed") == ["setup", "active", "device", "completed"]
    passes = [event.number for event in pair.events if isinstance(event, PassBegan)]
    assert passes == list(range(1, len(passes) + 1)) and len(passes) >= 2
    moved = counting(source).check()
    runs_on(destination)
    assert counting(destination).check() > moved and counting(source).check() == moved


def test_figures(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    ended(source)
    info = query_migrate(source)
    ram = info["ram"]
    assert info["status"] == "completed"
    assert info["total-time"] >= info["downtime"] >= 0 and info["setup-time"] >= 0
    assert ram["total"] == 64 * 4096 and ram["remaining"] == 0 and ram["page-size"] == 4096
    assert ram["normal"] + ram["duplicate"] >= 64 and ram["normal-bytes"] == ram["normal"] * 4096
    assert ram["transferred"] > ram["normal-bytes"] and ram["dirty-sync-count"] >= 2
    arrived(destination)
    assert query_migrate(destination) == {"status": "completed"}


def test_a_running_guest_is_stopped_for_what_it_dirtied_last(pair: Pair) -> None:
    """The downtime is only for the last writes, even if more would fit into the limit."""
    # So little RAM that even a busy host sends it within the half second in which a pass is worth finishing, and a
    # guest so slow that it dirties little of it, however long that takes.
    machine = CountingMachine(pages=64, pause=0.3)
    machine.block.pages[:, 8:] = 1
    source, destination = pair.source(machine), pair.destination()
    source.set_parameters({"downtime-limit": 2000})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and arrived(destination) == "completed"
    ram = query_migrate(source)["ram"]
    assert ram["downtime-bytes"] < ram["total"] / 4, ram
    runs_on(destination)


PROPERTIES = ("send-configuration", "send-section-footer", "send-vmdescription", "store-global-state")


@pytest.mark.parametrize("states", list(itertools.product((True, False), repeat=4)), ids=str)
@pytest.mark.parametrize("return_path", [True, False])
def test_every_way_of_framing(pair: Pair, states: tuple[bool, ...], return_path: bool) -> None:
    properties = dict(zip(PROPERTIES, states, strict=True))
    source, destination = pair.source(properties=properties), pair.destination(properties=properties)
    source.set_capabilities({"return-path": return_path})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed", query_migrate(source)
    assert arrived(destination) == "completed", query_migrate(destination)
    runs_on(destination)


def test_a_paused_guest_stays_paused(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.stop()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and arrived(destination) == "completed"
    assert destination.machine.run_state is RunState.PAUSED
    destination.cont()
    runs_on(destination)


def test_through_a_file(pair: Pair, tmp_path: Path) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"return-path": False})
    source.migrate(f"file:{tmp_path}/guest")
    assert ended(source) == "completed"
    destination.migrate_incoming(f"file:{tmp_path}/guest")
    assert arrived(destination) == "completed"
    runs_on(destination)
    source.cont()  # the guest was stored and runs nowhere else, so it may go on here
    runs_on(source)


def test_pause_before_switchover(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert source.outgoing.wait(frozenset({MigrationStatus.PRE_SWITCHOVER}), PATIENCE)
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    with pytest.raises(StateError, match="not in expected state: pre-switchover"):
        source.continue_migration(MigrationStatus.DEVICE)
    with pytest.raises(StateError, match="stopped for the switchover"):
        source.cont()
    source.continue_migration(MigrationStatus.PRE_SWITCHOVER)
    assert ended(source) == "completed"
    assert pair.statuses("completed") == ["setup", "active", "pre-switchover", "device", "completed"]
    arrived(destination)
    runs_on(destination)


def test_a_guest_that_moved_is_not_started_here_again(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    ended(source)
    with pytest.raises(StateError, match="the guest has moved"):
        source.cont()


def test_what_is_refused_starts_nothing(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    for uri, error in (
        ("no-such:thing", UriError),
        ("nonsense", UriError),
        ("defer", UsageError),
        ("tcp:127.0.0.1:99999", UriError),
        ("file:/tmp/never-written", SettingsError),  # no return path
    ):
        with pytest.raises(error):
            source.migrate(uri)
    with pytest.raises(StateError, match="no paused migration"):
        source.migrate("tcp:127.0.0.1:1", resume=True)
    with pytest.raises(StateError, match="waiting for an incoming"):
        destination.migrate("tcp:127.0.0.1:1")
    with pytest.raises(StateError, match="'-incoming' was not specified"):
        source.migrate_incoming("tcp:127.0.0.1:0")
    assert source.outgoing.status == "none" and pair.statuses() == []
    runs_on(source)


def test_one_migration_at_a_time(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    uri = destination.migrate_incoming("tcp:127.0.0.1:0")
    source.migrate(uri)
    source.outgoing.wait(frozenset({MigrationStatus.PRE_SWITCHOVER}), PATIENCE)
    with pytest.raises(StateError, match="in progress"):
        source.migrate(uri)
    with pytest.raises(StateError, match="in progress"):
        source.set_capabilities({"events": False})
    source.set_parameters({"max-bandwidth": 1 << 30})  # parameters may change in flight
    source.cancel()
    assert ended(source) == "cancelled"


def test_blockers_are_told_all_at_once(pair: Pair) -> None:
    source = pair.source()
    source.add_blocker("'grid' is attached to a GPU (detach it)")
    source.add_blocker("a debugger holds the guest")
    with pytest.raises(BlockedError) as refused:
        source.migrate("tcp:127.0.0.1:1")
    assert len(refused.value.reasons) == 2
    assert query_migrate(source) == {"blocked-reasons": list(refused.value.reasons)}
    source.remove_blocker("a debugger holds the guest")
    source.remove_blocker("'grid' is attached to a GPU (detach it)")
    destination = pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed"


def test_a_guest_that_cannot_migrate_is_not_taken_under_only_migratable(pair: Pair) -> None:
    table = replace(COUNTER, unmigratable="it is bolted to the floor")
    pair.source(CountingMachine(table=table))
    with pytest.raises(UsageError, match=r"only-migratable was asked for: .*it is bolted to the floor"):
        pair.source(CountingMachine(table=table), properties={"only-migratable": True})


def test_blockers_are_refused_under_only_migratable_and_while_migrating(pair: Pair) -> None:
    with pytest.raises(UsageError, match="only-migratable"):
        pair.source(properties={"only-migratable": True}).add_blocker("a reason")
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    source.outgoing.wait(frozenset({MigrationStatus.PRE_SWITCHOVER}), PATIENCE)
    with pytest.raises(StateError, match="migration in progress"):
        source.add_blocker("a reason")
    source.cancel()
    ended(source)
    source.add_blocker("a reason")


def test_a_device_that_cannot_migrate_blocks(pair: Pair) -> None:
    from dataclasses import replace

    from tests.helpers.machines import COUNTER

    table = replace(COUNTER, unmigratable="the counter is wired to a clock")
    source = pair.source(CountingMachine(table=table))
    with pytest.raises(BlockedError, match="wired to a clock"):
        source.migrate("tcp:127.0.0.1:1")


def test_again_after_a_failure(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.migrate("tcp:127.0.0.1:1")
    assert ended(source) == "failed"
    assert "refused" in query_migrate(source)["error-desc"]
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed"
    arrived(destination)
    runs_on(destination)
