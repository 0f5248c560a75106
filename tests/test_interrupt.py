"""Interrupt: set once, it stays set, and ends every wait on it from any thread."""

import os
import resource
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from corefw.channel import Interrupt
from corefw.errors import ChannelError, Interrupted


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    made = Interrupt()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_it_stays_set(interrupt: Interrupt) -> None:
    assert not interrupt.is_set()
    interrupt.check()
    for _ in range(2):
        interrupt.set()
        for _ in range(2):
            assert interrupt.is_set()
            assert interrupt.wait(None)
            with pytest.raises(Interrupted):
                interrupt.check()
    assert issubclass(Interrupted, ChannelError)


def test_waiting_ends_without_it(interrupt: Interrupt, pair: tuple[socket.socket, socket.socket]) -> None:
    assert not interrupt.wait(0)
    assert not interrupt.wait(-1)
    assert not interrupt.wait_for(pair[0].fileno(), select.POLLIN, 0)


def test_waiting_for_a_descriptor_ends_with_what_happens_there(
    interrupt: Interrupt, pair: tuple[socket.socket, socket.socket]
) -> None:
    assert interrupt.wait_for(pair[0].fileno(), select.POLLOUT)
    pair[1].send(b"x")
    assert interrupt.wait_for(pair[0].fileno(), select.POLLIN)
    pair[1].close()
    assert interrupt.wait_for(pair[0].fileno(), 0)  # a hang-up is always told


def test_it_goes_before_what_happens_on_the_descriptor(
    interrupt: Interrupt, pair: tuple[socket.socket, socket.socket]
) -> None:
    pair[1].send(b"x")
    interrupt.set()
    with pytest.raises(Interrupted):
        interrupt.wait_for(pair[0].fileno(), select.POLLIN)


def test_it_ends_the_waits_of_many_threads(interrupt: Interrupt, pair: tuple[socket.socket, socket.socket]) -> None:
    ended: list[str] = []

    def sleeper() -> None:
        if interrupt.wait(None):
            ended.append("wait")

    def poller() -> None:
        try:
            interrupt.wait_for(pair[0].fileno(), select.POLLIN)
        except Interrupted:
            ended.append("wait_for")

    threads = [threading.Thread(target=target) for target in (sleeper, poller) * 3]
    for thread in threads:
        thread.start()
    interrupt.set()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["wait"] * 3 + ["wait_for"] * 3


def test_it_can_be_polled_and_closed(interrupt: Interrupt) -> None:
    fd = interrupt.fileno()
    assert not os.get_inheritable(fd)
    interrupt.set()
    assert select.select([interrupt], [], [], 0)[0]
    interrupt.close()
    interrupt.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    interrupt.set()
    assert interrupt.is_set()


def test_it_is_made_and_set_where_no_descriptor_is_left() -> None:
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, kept[1]))
    try:
        interrupt = Interrupt()
        with pytest.raises(ChannelError, match="too many open files"):
            interrupt.wait(0)
        interrupt.set()
        assert interrupt.is_set() and interrupt.wait(None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)
    assert select.select([interrupt], [], [], 0)[0]
