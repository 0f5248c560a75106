"""Counting, measuring and pacing, in virtual time; and channels beside the stream's own, over real sockets."""

from __future__ import annotations

import bisect
import os
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.channel import Buffer, Channel, SendsMemory, SendsToSocket, receive_exactly
from corefw.engine.meter import (
    FIRST_WINDOW,
    FREE_LEAST,
    FREE_START,
    MOST_BUDGET,
    STEP,
    WINDOW,
    Meter,
    MeteredChannel,
    metered,
    portions,
)
from corefw.errors import MigfwError
from corefw.net.sockets import SocketChannel
from tests.helpers.engines import PATIENCE, Pair, arrived, ended, runs_on


class World:
    """A meter in virtual time, as on a machine that is never late."""

    def __init__(self, limit: int = 0) -> None:
        self.now = 100.0
        self.limits = {"max-bandwidth": limit}
        configuration: Any = SimpleNamespace(integer=lambda name: self.limits[name])
        self.meter = Meter(configuration, clock=lambda: self.now)

    def wait(self) -> None:
        while (rest := self.meter.rest()) > 0:
            self.now += min(rest, 0.1) + 1e-6

    def budget(self) -> int:
        with self.meter.step() as budget:
            return budget


# -- pacing ------------------------------------------------------------------------------------------------------------


@given(
    limit=st.integers(1 << 20, 1 << 33),
    work=st.lists(st.floats(0, 0.5), min_size=20, max_size=60),
    overshoot=st.integers(0, 8192),
)
@settings(max_examples=60)
def test_no_second_has_more_than_five_percent_too_much(limit: int, work: list[float], overshoot: int) -> None:
    """`work` is how long sending a step takes, as a fraction of the time due for it; now and then it stalls."""
    world = World(limit)
    sent: list[tuple[float, int]] = []
    while world.now < 103.0:
        budget = world.budget() + overshoot
        share = work[len(sent) % len(work)]
        world.now += share * budget / limit if share < 0.49 else 0.2  # a stall, not made up for
        sent.append((world.now, budget))
        world.meter.sent(budget)
        world.wait()
    moments = [moment for moment, _ in sent]
    for at, moment in enumerate(moments):
        end = bisect.bisect_left(moments, moment + 1.0)
        assert sum(count for _, count in sent[at:end]) <= 1.05 * limit + overshoot


@given(limit=st.integers(1 << 20, 1 << 28))
@settings(max_examples=40)
def test_every_second_has_what_it_may_have(limit: int) -> None:
    world = World(limit)
    began = world.now
    while world.now < began + 1.0:
        world.meter.sent(world.budget())
        world.wait()
    assert 0.95 * limit <= world.meter.total <= 1.05 * limit


def test_a_limit_may_change_in_flight() -> None:
    world = World(1 << 20)
    world.meter.sent(1 << 20)
    world.wait()
    assert 1.0 <= world.now - 100 < 1.01
    world.limits["max-bandwidth"] = 0
    world.meter.sent(1 << 20)
    assert world.meter.rest() == 0
    assert world.budget() == FREE_START
    world.limits["max-bandwidth"] = 100 << 20
    assert world.budget() == int((100 << 20) * STEP)


@pytest.mark.parametrize(
    ("bandwidth", "budget"), [(1 << 20, FREE_LEAST), (1 << 30, (1 << 30) // 50), (1 << 40, MOST_BUDGET)]
)
def test_a_free_stream_goes_in_steps_of_a_fiftieth_of_a_second(bandwidth: int, budget: int) -> None:
    world = World()
    before = world.budget()
    for _ in range(12):
        with world.meter.step() as count:
            assert count <= 2 * before
            before = count
            world.now += count / bandwidth
            world.meter.sent(count)
    assert world.budget() == pytest.approx(budget, rel=0.01)
    with world.meter.step():
        world.meter.sent(40)  # the end of a pass says nothing about the path
    assert world.budget() == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize(("later", "seconds"), [(0, 1.0), (10 << 20, 1.9), (512 << 10, 10.0)])
def test_a_higher_limit_counts_for_what_is_owed_already_and_a_lower_one_does_not(later: int, seconds: float) -> None:
    """Ten seconds' worth was sent; a second later the limit becomes none, ten times or half of what it was."""
    world = World(1 << 20)
    world.meter.sent(10 << 20)
    world.now += 1.0
    assert 8.9 < world.meter.rest() < 9.1
    world.limits["max-bandwidth"] = later
    world.wait()
    assert world.now - 100 == pytest.approx(seconds, abs=0.02)


def test_the_limit_is_another_parameter_s_or_none() -> None:
    world = World(1 << 20)
    world.limits["max-postcopy-bandwidth"] = 4 << 20
    world.meter.sent(4 << 20)
    assert world.meter.rest() == pytest.approx(4.0)
    world.meter.hold_at("max-postcopy-bandwidth")
    assert world.meter.rest() == pytest.approx(1.0)
    world.meter.release()
    assert world.meter.rest() == 0


def test_urgent_work_waits_for_nothing() -> None:
    world = World(1 << 20)
    world.meter.sent(1 << 20)
    world.meter.urgent_begins()
    world.meter.urgent_begins()
    world.meter.pace()
    world.meter.urgent_ends()
    assert world.meter.rest() == 0, "a second page was asked for"
    world.meter.urgent_ends()
    assert world.meter.rest() == pytest.approx(1.0)


def test_what_a_step_has_room_for_is_waited_for_afterwards() -> None:
    world = World(1 << 20)
    world.meter.sent(1 << 20)
    with world.meter.unheld():
        world.meter.pace()
        assert world.meter.rest() == 0
    assert world.meter.rest() == pytest.approx(1.0)


def test_a_limit_that_is_set_in_a_step_without_one_holds_at_once() -> None:
    world = World(0)
    with world.meter.unheld():
        world.limits["max-bandwidth"] = 1 << 20
        world.meter.sent(1 << 20)
        assert world.meter.rest() == pytest.approx(1.0)


def test_a_wait_ends_with_what_the_check_raises() -> None:
    def check() -> None:
        raise MigfwError("cancelled")

    configuration: Any = SimpleNamespace(integer=lambda _: 1)
    meter = Meter(configuration, check)
    meter.sent(1 << 20)
    with pytest.raises(MigfwError, match="cancelled"):
        meter.pace()


@pytest.mark.parametrize("how", ["a new limit", "a cancel"])
def test_a_wait_is_cut_short_by(pair: Pair, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """At one byte a second the source would wait for hours."""
    monkeypatch.setattr("corefw.engine.meter.LOOK", 3600)
    source, destination = pair.source(), pair.destination()
    source.set_parameters({"max-bandwidth": 1})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    deadline = time.monotonic() + PATIENCE
    while (transfer := source.report().transfer) is None or not transfer.transferred:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    if how == "a cancel":
        source.cancel()
        assert ended(source) == "cancelled"
        runs_on(source)
    else:
        source.set_parameters({"max-bandwidth": 0})
        assert ended(source) == "completed" and arrived(destination) == "completed"
        runs_on(destination)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_the_first_measurement_comes_early_and_the_others_every_window() -> None:
    world = World()
    world.meter.sent(500)
    world.meter.start_window()
    world.meter.sent(1_000_000)
    world.now += 0.6 * FIRST_WINDOW
    assert world.meter.measure() == 0 and world.meter.bandwidth == 0
    world.now += 0.6 * FIRST_WINDOW
    assert world.meter.measure() == 1_000_000
    assert world.meter.bandwidth == pytest.approx(1_000_000 / (1.2 * FIRST_WINDOW))
    world.meter.sent(8_000_000)
    world.now += 0.6 * WINDOW
    assert world.meter.measure() == 0 and world.meter.bandwidth > 8e7
    world.now += 0.6 * WINDOW
    assert world.meter.measure() == 8_000_000
    assert world.meter.bandwidth == pytest.approx(8_000_000 / (1.2 * WINDOW))


# -- channels ----------------------------------------------------------------------------------------------------------


class Collecting(Channel):
    """Accepts everything at once."""

    peer, has_return_path = "nobody", False

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.during: Callable[[], None] = lambda: None

    def send(self, *parts: Buffer) -> None:
        self.calls.append(b"".join(parts))
        self.during()

    def receive_into(self, view: memoryview) -> int:
        raise AssertionError

    def wait_readable(self, seconds: float) -> bool:
        raise AssertionError

    def send_eof(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


@given(parts=st.lists(st.binary(max_size=30_000), max_size=8), limit=st.sampled_from([0, 1, 1 << 20, 1 << 30]))
def test_what_is_sent_goes_out_whole_and_in_order(parts: list[bytes], limit: int) -> None:
    split = [list(portion) for portion in portions(parts, limit)]
    assert b"".join(b"".join(portion) for portion in split) == b"".join(parts)
    assert limit or len(split) == 1


def test_several_channels_share_one_limit() -> None:
    """Three channels send as fast as they may, in virtual time, where each waits for its turn."""
    limit = 1 << 20
    world = World(limit)
    inner = [Collecting() for _ in range(3)]
    channels = [MeteredChannel(channel, world.meter) for channel in inner]
    world.meter.pace = world.wait  # type: ignore[method-assign]  # time passes instead of the thread waiting
    for _ in range(4):
        for channel in channels:
            channel.send(b"x" * limit)
    assert world.now - 100 == pytest.approx(12.0, rel=0.01)
    assert world.meter.total == 12 * limit == sum(len(call) for channel in inner for call in channel.calls)
    assert max(len(call) for call in inner[0].calls) <= limit * STEP, "no burst"


def test_memory_is_sent_from_where_it_is_and_counted() -> None:
    """If the wrapper hid this feature of the channel, every migration over a socket would be slower."""
    world = World()
    memory = np.frombuffer(bytearray(b"some of the guest's memory"), dtype=np.uint8)
    here, there = socket.socketpair()
    with SocketChannel(here, "there") as inner, SocketChannel(there, "here") as peer:
        channel = metered(inner, world.meter)
        assert isinstance(channel, SendsMemory)
        channel.send_memory(np.array([[memory.ctypes.data, 4], [memory.ctypes.data + 8, 3]], dtype=np.uint64))
        received = bytearray(7)
        receive_exactly(peer, memoryview(received))
    assert received == b"somethe" and world.meter.total == 7
    assert not isinstance(metered(Collecting(), world.meter), SendsMemory)


def test_what_goes_out_over_a_socket_that_is_lent_is_counted() -> None:
    world = World()
    here, there = socket.socketpair()
    with SocketChannel(here, "there") as inner, SocketChannel(there, "here") as peer:
        channel = metered(inner, world.meter)
        assert isinstance(channel, SendsToSocket)
        assert channel.send_to_socket(lambda descriptor: os.write(descriptor, b"some memory")) == 11
        received = bytearray(11)
        receive_exactly(peer, memoryview(received))
    assert received == b"some memory" and world.meter.total == 11


def test_a_send_that_hangs_shows() -> None:
    world = World()
    inner = Collecting()
    seen = []

    def hang() -> None:
        world.now += 7
        seen.append(world.meter.longest_send())

    inner.during = hang
    MeteredChannel(inner, world.meter).send(b"x")
    assert seen == [7.0] and world.meter.longest_send() == 0
