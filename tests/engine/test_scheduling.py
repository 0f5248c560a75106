"""The threads that move bytes yield to the guest, and no others do."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from corefw.engine.scheduling import run_behind_requests, yielding_to_guests
from tests.helpers.engines import Pair, arrived, ended
from tests.helpers.machines import CountingMachine


def test_a_thread_is_as_before_when_it_is_done() -> None:
    before = os.sched_getscheduler(0)
    with yielding_to_guests():
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before == os.SCHED_OTHER


def test_a_policy_that_somebody_chose_is_left_alone() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        with yielding_to_guests():
            pass
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_a_guest_that_arrives_is_started_as_any_other(pair: Pair) -> None:
    policies: list[int] = []

    class Noting(CountingMachine):
        def start(self) -> None:
            policies.append(os.sched_getscheduler(0))
            super().start()

    source, destination = pair.source(), pair.destination(Noting(incoming=True))
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and arrived(destination) == "completed"
    assert policies == [os.SCHED_OTHER]


def test_background_work_has_a_lower_priority() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), sys.getswitchinterval()

    def look() -> tuple[int, float]:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), sys.getswitchinterval()

    nice, interval = run_behind_requests(look)
    assert nice > before[0] or nice == 19
    assert interval < before[1]
    assert look() == before


def test_what_it_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        run_behind_requests(lambda: 1 // 0)
