"""Observers see events in order, one at a time, and none of them can delay or silence another."""

from __future__ import annotations

import threading
from asyncio import CancelledError
from dataclasses import dataclass

import pytest

from corefw.dispatch import Event, EventDispatcher

PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Number(Event):
    value: int


def number(event: Event) -> int:
    assert isinstance(event, Number)
    return event.value


def test_events_are_delivered_in_order_even_those_that_an_observer_causes() -> None:
    events = EventDispatcher()
    heard: list[tuple[str, int]] = []

    def hasty(event: Event) -> None:
        if number(event) < 5:
            events.publish(Number(number(event) + 10))
        heard.append(("hasty", number(event)))

    events.observe(hasty)
    events.observe(lambda event: heard.append(("calm", number(event))))
    for value in (1, 2):
        events.post(Number(value))
    assert heard == []
    events.deliver()
    assert heard == [(name, value) for value in (1, 2, 11, 12) for name in ("hasty", "calm")]


def test_no_thread_waits_for_an_observer() -> None:
    events = EventDispatcher()
    begun, go_on = threading.Event(), threading.Event()
    heard: list[int] = []

    def slow(event: Event) -> None:
        begun.set()
        assert go_on.wait(PATIENCE)
        heard.append(number(event))

    events.observe(slow)
    delivering = threading.Thread(target=events.publish, args=(Number(1),))
    delivering.start()
    assert begun.wait(PATIENCE)
    events.publish(Number(2))
    assert heard == []
    go_on.set()
    delivering.join()
    assert heard == [1, 2]


def test_what_is_held_is_delivered_when_the_outermost_block_ends() -> None:
    events = EventDispatcher()
    heard: list[int] = []
    events.observe(lambda event: heard.append(number(event)))
    with pytest.raises(ZeroDivisionError), events.hold():
        with events.hold():
            events.publish(Number(1))
        events.publish(Number(2))
        assert heard == []
        raise ZeroDivisionError
    assert heard == [1, 2]


def test_another_thread_delivers_although_one_holds() -> None:
    events = EventDispatcher()
    heard: list[int] = []
    events.observe(lambda event: heard.append(number(event)))
    with events.hold():
        other = threading.Thread(target=events.publish, args=(Number(1),))
        other.start()
        other.join()
        assert heard == [1]


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), SystemExit("no"), CancelledError()], ids=["a bug", "sys.exit", "cancelled"]
)
def test_an_observer_that_fails_is_logged_and_the_others_still_hear(
    caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    events = EventDispatcher()
    heard: list[int] = []

    def broken(_: Event) -> None:
        raise error

    events.observe(broken)
    events.observe(lambda event: heard.append(number(event)))
    events.publish(Number(1))
    events.publish(Number(2))
    assert heard == [1, 2]
    assert "an observer of Number failed" in caplog.text


def test_an_observer_that_ended_hears_nothing_more() -> None:
    events = EventDispatcher()
    heard: list[int] = []
    end = events.observe(lambda event: heard.append(number(event)))
    events.publish(Number(1))
    end()
    end()
    events.publish(Number(2))
    assert heard == [1]
