"""Engine.check(): cases that the command line cannot cause."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from corefw.engine import arrival, checking
from corefw.testing.tasks import wait_until
from corefw.wire.constants import BE32
from corefw.wire.stream import MemorySource, StreamReader
from tests.helpers.engines import PATIENCE, Pair, counting, ended, runs_on
from tests.helpers.machines import CountingMachine


def dialled(uri: str) -> socket.socket:
    _, host, port = uri.split(":")
    return socket.create_connection((host, int(port)), PATIENCE)


def ask(uri: str, document: dict[str, object]) -> bytes:
    """The answer of a destination to a source with these facts."""
    with dialled(uri) as connection:
        connection.sendall(checking.MAGIC + checking.pack(document))
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


def facts_like(pair: Pair) -> dict[str, object]:
    """The facts of a source that fits."""
    settings = pair.plugins.settings()
    machine = CountingMachine()
    try:
        return checking.facts_of(machine, settings, pair.plugins.section_savers(machine, settings))
    finally:
        machine.close()


@pytest.mark.parametrize("name", ["kind", "name", "ram", "layout", "sections", "properties"])
@pytest.mark.parametrize("value", [None, 5, "text", [5, None], [[]], {"a": {}}])
def test_a_destination_survives_whatever_a_check_says(pair: Pair, name: str, value: object) -> None:
    uri = pair.destination().migrate_incoming("tcp:127.0.0.1:0")
    answer = ask(uri, {**facts_like(pair), name: value})
    assert set(checking.read_message(StreamReader(MemorySource(answer)))) == {"facts", "problems", "notes"}
    source = pair.source()
    source.migrate(uri)
    assert ended(source) == "completed", "it waits on"


def test_an_answer_is_short_whatever_was_asked(pair: Pair) -> None:
    uri = pair.destination().migrate_incoming("tcp:127.0.0.1:0")
    for name, value in {"name": "\u00e9" * 100_000, "sections": ["\u00e9" * 1000 + str(n) for n in range(300)]}.items():
        document = {**facts_like(pair), name: value}
        assert len(checking.pack(document)) < checking.MESSAGE_LIMIT
        answer = ask(uri, document)
        assert checking.read_message(StreamReader(MemorySource(answer)))["problems"]
        assert len(answer) < 100_000


def test_a_destination_survives_a_machine_that_fails_at_a_check(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compare_layout(self: CountingMachine, there: bytes) -> tuple[list[str], list[str]]:
        raise RuntimeError("no comparison today")

    monkeypatch.setattr(CountingMachine, "compare_layout", compare_layout)
    uri = pair.destination().migrate_incoming("tcp:127.0.0.1:0")
    assert ask(uri, facts_like(pair)) == b""
    assert wait_until(lambda: "no comparison today" in caplog.text)
    source = pair.source()
    source.migrate(uri)
    assert ended(source) == "completed"


def test_a_blocker_is_a_problem(pair: Pair) -> None:
    source = pair.source()
    source.add_blocker("it is attached to a device")
    found = source.check()
    assert found.problems == ("it is attached to a device",)


def test_a_host_without_room_is_a_problem(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = pair.destination()
    uri = destination.migrate_incoming("tcp:127.0.0.1:0")
    source = pair.source()
    monkeypatch.setattr(checking, "spare_memory", lambda: 4096)
    [problem] = source.check(uri).problems
    assert problem.startswith("the destination: the guest has ")
    assert problem.endswith("and this host has 4.0 KiB to spare")


def test_properties_that_differ_are_a_problem(pair: Pair) -> None:
    destination = pair.destination(properties={"send-section-footer": False})
    source = pair.source()
    [problem] = source.check(destination.migrate_incoming("tcp:127.0.0.1:0")).problems
    assert problem == "the destination: property send-section-footer is off here and must be the same on both sides"


def test_a_stopped_guest_is_checked_without_its_dirty_rate(pair: Pair) -> None:
    found = pair.source(running=False).check()
    assert (found.problems, found.dirty_rate) == ((), None)
    assert "cannot be measured" in found.notes[0]


def test_no_write_is_lost_by_checks_before_a_migration(pair: Pair) -> None:
    destination = pair.destination()
    uri = destination.migrate_incoming("tcp:127.0.0.1:0")
    source = pair.source()
    for _ in range(2):
        assert source.check(uri).problems == ()
    source.migrate(uri)
    assert ended(source) == "completed"
    assert counting(destination).run_state == "running"
    runs_on(destination)


def test_a_check_that_dribbles_does_not_keep_a_migration_waiting(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "PATIENCE", 0.5)
    uri = pair.destination().migrate_incoming("tcp:127.0.0.1:0")
    ended_by_the_destination = threading.Event()

    def dribble() -> None:
        with contextlib.suppress(OSError), dialled(uri) as connection:
            connection.sendall(checking.MAGIC + checking.pack(facts_like(pair)))
            asked.set()
            for _ in range(int(PATIENCE * 100)):
                connection.sendall(BE32.pack(1) + b"x")
                time.sleep(0.01)
            return
        ended_by_the_destination.set()

    asked = threading.Event()
    dribbling = threading.Thread(target=dribble)
    dribbling.start()
    assert asked.wait(PATIENCE)
    source = pair.source()
    source.migrate(uri)
    assert ended(source) == "completed"
    dribbling.join()
    assert ended_by_the_destination.is_set()
