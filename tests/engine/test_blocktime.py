"""How long a guest waits for pages in postcopy, by a clock of the test's own and in a real migration."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from corefw.engine.blocktime import Blocktime
from corefw.testing.tasks import wait_until
from tests.helpers.engines import Pair, query_migrate
from tests.helpers.moving import Move

MAIN, WORKER, OTHER = 100, 101, 0
MICROSECOND = 1000


class Bench:
    """Measurements by a clock in microseconds."""

    def __init__(self) -> None:
        self.now = 0
        self.blocktime = Blocktime(lambda: self.now * MICROSECOND)

    def fault(self, page: int, thread: int = MAIN) -> None:
        self.blocktime.began({"ram": np.array([[page, thread]])})

    def install(self, first: int, end: int, *, block: str = "ram", requested: bool = True) -> None:
        self.blocktime.ended(block, np.array([[first, end]]), requested=requested)

    def wait(self, microseconds: int, page: int, thread: int = MAIN) -> None:
        """A fault of this length."""
        self.fault(page, thread)
        self.now += microseconds
        self.install(page, page + 1)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_fault_lasts_until_its_page_is_installed(bench: Bench) -> None:
    bench.fault(7)
    bench.now = 100
    bench.install(0, 7)
    bench.install(8, 9)
    bench.install(7, 8, block="small")
    assert (bench.blocktime.report().faults, bench.blocktime.report().waiting) == (0, 1)
    bench.blocktime.ended("ram", np.array([[0, 3], [5, 7], [8, 9]]), requested=True)
    assert bench.blocktime.report().waiting == 1
    bench.now = 300
    bench.blocktime.ended("ram", np.array([[0, 3], [5, 10], [12, 13]]), requested=True)
    report = bench.blocktime.report()
    assert (report.faults, report.waiting) == (1, 0)
    assert report.average == report.longest == report.blocktime == 300 * MICROSECOND
    assert [count for count in report.distribution if count] == [report.distribution[8]] == [1]


def test_a_page_that_was_here_already_does_not_count(bench: Bench) -> None:
    bench.fault(7)
    bench.now = 5
    bench.install(7, 8, requested=False)
    report = bench.blocktime.report()
    assert (report.faults, report.waiting, report.blocktime, sum(report.distribution)) == (0, 0, 0, 0)


def test_threads_are_told_apart_and_the_total_is_when_all_wait(bench: Bench) -> None:
    bench.wait(10, page=1)
    bench.wait(20, page=2, thread=WORKER)
    bench.fault(3)
    bench.now += 100
    bench.fault(4, WORKER)
    bench.now += 50
    bench.install(3, 4)
    bench.now += 200
    bench.install(4, 5)
    report = bench.blocktime.report()
    assert report.blocktime_of_threads == (160 * MICROSECOND, 270 * MICROSECOND)
    assert report.average_of_threads == (80 * MICROSECOND, 135 * MICROSECOND)
    assert report.blocktime == (10 + 50) * MICROSECOND, "the worker was not known yet when only the main thread waited"


def test_two_threads_wait_for_one_page(bench: Bench) -> None:
    bench.fault(7)
    bench.now = 40
    bench.fault(7, WORKER)
    bench.fault(7)  # woken in vain
    bench.now = 100
    bench.install(7, 8)
    report = bench.blocktime.report()
    assert report.faults == 2
    assert report.blocktime_of_threads == (100 * MICROSECOND, 60 * MICROSECOND)


def test_a_thread_that_faults_again_has_its_page(bench: Bench) -> None:
    """A thread continues as soon as its page is installed, and may fault again before that is recorded."""
    bench.fault(7)
    bench.now = 100
    bench.fault(8)
    bench.install(7, 8)
    bench.now = 150
    bench.install(8, 9)
    report = bench.blocktime.report()
    assert (report.faults, report.longest) == (2, 100 * MICROSECOND)
    assert report.blocktime_of_threads == (report.blocktime,) == (150 * MICROSECOND,)


def test_a_thread_that_is_not_the_guests_counts_for_latencies_alone(bench: Bench) -> None:
    bench.wait(30, page=1, thread=OTHER)
    report = bench.blocktime.report()
    assert report.average_of_others == report.average == 30 * MICROSECOND
    assert report.blocktime == 0 and report.blocktime_of_threads == ()


def test_percentiles_are_within_a_few_percent(bench: Bench) -> None:
    lengths = [*range(100, 200), 5000]
    for page, microseconds in enumerate(lengths):
        bench.wait(microseconds, page)
    report = bench.blocktime.report()
    assert report.median == pytest.approx(150 * MICROSECOND, rel=0.04)
    assert report.p99 == pytest.approx(199 * MICROSECOND, rel=0.04)
    assert report.longest == 5000 * MICROSECOND
    assert report.distribution[6] + report.distribution[7] == 100
    assert report.distribution[12] == 1


def test_a_program_that_starts_threads_without_end_is_no_burden(bench: Bench) -> None:
    for thread in range(1, 1001):
        bench.wait(10, page=thread, thread=thread)
    report = bench.blocktime.report()
    assert report.faults == 1000
    assert len(report.blocktime_of_threads) == 256
    assert report.average_of_others == 10 * MICROSECOND


# -- a real migration --------------------------------------------------------------------------------------------------

QEMU_MEMBERS = {
    "postcopy-blocktime",
    "postcopy-vcpu-blocktime",
    "postcopy-latency",
    "postcopy-latency-dist",
    "postcopy-vcpu-latency",
    "postcopy-non-vcpu-latency",
}


@pytest.fixture
def move(pair: Pair) -> Iterator[Move]:
    yield Move(pair)


def test_a_migration_is_measured(move: Move) -> None:
    move.destination.set_capabilities({"postcopy-blocktime": True})
    move.switch()
    assert wait_until(lambda: query_migrate(move.destination)["x-migfw"]["page-faults"]["count"] > 10)
    assert not QEMU_MEMBERS & query_migrate(move.destination).keys(), "QEMU gives them once it has completed"
    move.hurry()
    move.completes()
    answer = query_migrate(move.destination)
    assert answer.keys() >= QEMU_MEMBERS
    faults = answer["x-migfw"]["page-faults"]
    assert faults["waiting"] == 0
    assert sum(answer["postcopy-latency-dist"]) == faults["count"]
    assert 0 < faults["latency-p50"] <= faults["latency-p99"] <= faults["latency-max"]
    assert 0 < answer["postcopy-latency"] <= faults["latency-max"]
    [latency] = answer["postcopy-vcpu-latency"]  # the guest has one thread
    others = answer["postcopy-non-vcpu-latency"]  # of what looked at its RAM before it ran, if that waited
    assert min(latency, others or latency) <= answer["postcopy-latency"] <= max(latency, others)
    assert answer["postcopy-vcpu-blocktime"] == [answer["postcopy-blocktime"]]
    json.dumps(answer)
