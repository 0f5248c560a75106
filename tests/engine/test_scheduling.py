from __future__ import annotations

import os
import threading

from corefw.engine.scheduling import yield_to_guests
from tests.helpers.engines import Pair, arrived, ended
from tests.helpers.machines import CountingMachine

BATCH = os.SCHED_BATCH | os.SCHED_RESET_ON_FORK


def test_the_thread_that_asks_is_a_batch_thread_and_no_other() -> None:
    before = os.sched_getscheduler(0)
    found: list[int] = []

    def note() -> None:
        found.append(os.sched_getscheduler(0))

    def work() -> None:
        yield_to_guests()
        note()
        started = threading.Thread(target=note)
        started.start()
        started.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [BATCH, os.SCHED_OTHER]
    assert os.sched_getscheduler(0) == before


def test_both_threads_of_a_migration_are(pair: Pair) -> None:
    policies: list[int] = []

    class Noting(CountingMachine):
        def ram_blocks(self):  # type: ignore[no-untyped-def]
            policies.append(os.sched_getscheduler(0))
            return super().ram_blocks()

    source, destination = pair.source(Noting()), pair.destination(Noting(incoming=True))
    policies.clear()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and arrived(destination) == "completed"
    assert policies.count(BATCH) >= 2
