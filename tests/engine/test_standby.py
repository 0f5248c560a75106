"""Threads that exist before they have something to do."""

from __future__ import annotations

import threading

from corefw.engine.standby import StandbyThread


def test_a_thread_that_stands_by_does_its_work_and_ends() -> None:
    names: list[str] = []
    thread = StandbyThread("standing by")
    thread.begin(lambda: names.append(threading.current_thread().name))
    thread.dismiss()  # too late
    thread.join()
    assert names == ["standing by"]
    assert thread.began
    assert not thread.is_alive


def test_a_thread_that_is_not_needed_ends() -> None:
    thread = StandbyThread("not needed")
    thread.dismiss()
    thread.dismiss()
    assert not thread.is_alive
