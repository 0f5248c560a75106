"""Observers may block or fail: nothing waits for them, and their events are true and in order."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from corefw.control import PassBegan, RunStateChanged
from corefw.dispatch import Event
from corefw.engine import Engine
from corefw.errors import StateError
from corefw.machine import RunState
from corefw.plugins import Plugins
from corefw.states import MigrationStatus, StatusChanged
from corefw.testing.tasks import wait_until
from tests.helpers.engines import PATIENCE, Pair, arrived, counting, ended, query_migrate, runs_on


def elsewhere(deed: Callable[[], object]) -> None:
    """Call a function in another thread and wait for it: under a lock that it needs, this would wait for ever."""

    def run() -> None:
        with suppress(StateError):
            deed()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the engine holds a lock while it tells"


def status(event: Event) -> MigrationStatus | None:
    """The new status if the event is a change of status."""
    return event.new if isinstance(event, StatusChanged) else None


def test_no_lock_is_held_while_events_are_told(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    heard: list[Event] = []

    def observe(event: Event) -> None:
        elsewhere(source.cont)
        elsewhere(lambda: source.add_blocker("in the way"))
        heard.append(event)

    source.observe(observe)
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed"
    deadline = time.monotonic() + PATIENCE
    while not heard or status(heard[-1]) != "completed":
        assert time.monotonic() < deadline, f"not told, but {heard}"
        time.sleep(0.001)
    assert status(heard[0]) == "setup"
    assert {RunStateChanged, PassBegan} <= set(map(type, heard))


def test_an_observer_may_try_again_when_a_migration_failed(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    uri = destination.migrate_incoming("tcp:127.0.0.1:0")

    def again(event: Event) -> None:
        if status(event) == "failed":
            source.migrate(uri)

    source.observe(again)
    source.migrate("tcp:127.0.0.1:1")
    assert arrived(destination) == "completed"
    assert pair.statuses("completed") == ["setup", "failing", "failed", "setup", "active", "device", "completed"]


def test_an_observer_may_close_the_engine(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    closed = threading.Event()

    def close(event: Event) -> None:
        if status(event) == "completed":
            source.close()
            closed.set()

    source.observe(close)
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert closed.wait(PATIENCE)
    assert arrived(destination) == "completed"
    runs_on(destination)


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_who_hears_the_end_sees_the_guest_as_it_is(pair: Pair, end: str) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    seen: list[RunState] = []
    source.observe(lambda event: seen.append(source.machine.run_state) if status(event) == end else None)

    def go_on(event: Event) -> None:
        if status(event) == "pre-switchover":
            if end == "completed":
                source.continue_migration(source.outgoing.status)
            elif end == "failed":
                destination.close()
            else:
                source.cancel()

    source.observe(go_on)
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == end
    assert wait_until(lambda: bool(seen))
    assert seen == [RunState.POSTMIGRATE if end == "completed" else RunState.RUNNING]


def test_every_harvest_of_the_dirty_log_is_a_pass(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    ended(source)
    pair.statuses("completed")
    passes = [event.number for event in pair.events if isinstance(event, PassBegan)]
    assert passes == list(range(1, query_migrate(source)["ram"]["dirty-sync-count"] + 1))


# -- nothing is left behind --------------------------------------------------------------------------------------------


def cancelled(source: Engine, uri: str) -> None:
    source.migrate(uri)
    source.cancel()


def possessions() -> tuple[int, set[str]]:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir())), {thread.name for thread in threading.enumerate()}


def test_migrations_leave_no_descriptor_and_no_thread(plugins: Plugins) -> None:
    def rounds(count: int) -> None:
        for _ in range(count):
            with Pair(plugins) as pair:
                source, destination = pair.source(), pair.destination()
                source.migrate("tcp:127.0.0.1:1")
                assert ended(source) == "failed"
                cancelled(source, "tcp:127.0.0.1:1")
                ended(source)
                source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
                assert ended(source) == "completed" and arrived(destination) == "completed"
                assert counting(destination).state.writes >= counting(source).state.writes

    rounds(2)
    before = possessions()
    rounds(5)
    deadline = time.monotonic() + PATIENCE
    while (after := possessions())[0] > before[0] or after[1] - before[1]:  # tests before this may have had more
        assert time.monotonic() < deadline, f"{before} before, {after} after"
        time.sleep(0.01)
