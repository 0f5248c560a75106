"""A destination that waits: strangers, sources that dribble or pause, and users who change their mind."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.engine import Engine, incoming
from corefw.errors import StateError, UriError
from corefw.machine import RunState
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until
from corefw.wire.constants import Command
from corefw.wire.records import Configuration, ping_payload, write_command, write_configuration, write_header
from corefw.wire.stream import MemorySink, StreamWriter
from tests.helpers.engines import PATIENCE, Pair, arrived, counting, ended, query_migrate, runs_on
from tests.helpers.machines import CountingMachine
from tests.helpers.moving import LISTEN

CANCELLED = frozenset({MigrationStatus.CANCELLED})
PATIENT = {"x-migfw-incoming-timeout": 60_000}


@contextlib.contextmanager
def dialled(uri: str) -> Iterator[socket.socket]:
    """A connection to a destination at tcp: or unix:."""
    scheme, _, where = uri.partition(":")
    if scheme == "unix":
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(where)
            yield connection
        return
    host, _, port = where.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        yield connection


def beginning(name: str = "counting") -> bytes:
    """The stream up to the first section."""
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_header(writer)
    write_configuration(writer, Configuration(name, b""))
    writer.flush()
    return bytes(sink.data)


def command(kind: Command) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_command(writer, kind)
    writer.flush()
    return bytes(sink.data)


def ended_by_destination(connection: socket.socket) -> None:
    """Wait until the other side has closed it."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass


# -- strangers ---------------------------------------------------------------------------------------------------------

STRANGERS: dict[str, bytes] = {
    "says nothing": b"",
    "says part of the magic": b"QEV",
    "wants a page": b"GET / HTTP/1.1\r\nHost: there\r\n\r\n",
    "sends noise": bytes(range(255, 0, -1)) * 100,
}


@pytest.mark.parametrize("case", STRANGERS)
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_a_connection_that_brings_no_migration_does_not_count(
    pair: Pair, folder: Path, case: str, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, destination = pair.source(), pair.destination()
    uri = destination.migrate_incoming("tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{folder}/in")
    for _ in range(2):
        with dialled(uri) as stranger:
            stranger.sendall(STRANGERS[case])
            if len(STRANGERS[case]) < 4:
                stranger.shutdown(socket.SHUT_WR)
            ended_by_destination(stranger)
    assert destination.incoming.status == "setup"
    lines = [record.getMessage() for record in caplog.records if "keeps waiting" in record.getMessage()]
    assert len(lines) == 2 and not any("\n" in line for line in lines), lines
    source.migrate(uri)
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    runs_on(destination)


def test_a_connection_that_waits_holds_up_others_only_for_a_while(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    destination.set_parameters({"x-migfw-incoming-timeout": 500})
    uri = destination.migrate_incoming("tcp:127.0.0.1:0")
    with dialled(uri) as stranger:
        source.migrate(uri)
        ended_by_destination(stranger)
        destination.set_parameters(PATIENT)
        assert (ended(source), arrived(destination)) == ("completed", "completed")
    runs_on(destination)


def test_where_there_is_only_one_connection_it_counts(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "guest").write_bytes(STRANGERS["wants a page"])
    destination = pair.destination()
    destination.migrate_incoming(f"file:{tmp_path}/guest")
    assert arrived(destination) == "failed"
    assert "beginning with 'QEVM'" in query_migrate(destination)["error-desc"]


def test_a_command_may_wait_for_its_source(pair: Pair, tmp_path: Path) -> None:
    """The limit begins with the first byte: exec: may be a command that listens itself."""
    # So little RAM that a pipe holds all of the stream, and the timing of the processes does not matter.
    source, destination = pair.source(CountingMachine(pages=8)), pair.destination(CountingMachine(8, incoming=True))
    source.set_capabilities({"return-path": False})
    source.migrate(f"file:{tmp_path}/guest")
    assert ended(source) == "completed"
    destination.set_parameters({"x-migfw-incoming-timeout": 500})
    destination.migrate_incoming(f"exec:sleep 1; cat {tmp_path}/guest")
    assert arrived(destination) == "completed", query_migrate(destination)
    runs_on(destination)


# -- sources that are slow ---------------------------------------------------------------------------------------------


def test_a_source_that_dribbles_is_given_up(pair: Pair) -> None:
    """A byte of a section's name now and then: each is correct, and the whole takes for ever."""
    destination = pair.destination()
    destination.set_parameters({"x-migfw-incoming-timeout": 1000})
    over = threading.Event()
    with dialled(destination.migrate_incoming("tcp:127.0.0.1:0")) as connection:
        connection.sendall(beginning() + b"\x01\0\0\0\0\xff")

        def dribble() -> None:
            while not over.wait(0.1):
                with contextlib.suppress(OSError):
                    connection.sendall(b"a")

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            assert arrived(destination) == "failed"
        finally:
            over.set()
            thread.join()
    assert "(parameter x-migfw-incoming-timeout)" in query_migrate(destination)["error-desc"]


def test_a_source_that_stops_in_the_middle_is_given_up_and_told(pair: Pair) -> None:
    destination = pair.destination()
    destination.set_parameters({"x-migfw-incoming-timeout": 500})
    with dialled(destination.migrate_incoming("tcp:127.0.0.1:0")) as connection:
        connection.sendall(beginning() + b"\x01\0\0")
        assert arrived(destination) == "failed"
    reason = query_migrate(destination)["error-desc"]
    assert "expected at least 1024 (parameter x-migfw-incoming-timeout)" in reason and "at offset" in reason


def test_a_source_in_pre_switchover_may_take_its_time(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert source.outgoing.wait(frozenset({MigrationStatus.PRE_SWITCHOVER}), PATIENCE)
    assert wait_until(lambda: destination.incoming.status == "active")
    time.sleep(0.3)  # what is on its way has arrived
    destination.set_parameters({"x-migfw-incoming-timeout": 200})
    time.sleep(0.7)
    assert destination.incoming.status == "active"
    destination.set_parameters(PATIENT)
    source.continue_migration(MigrationStatus.PRE_SWITCHOVER)
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    runs_on(destination)


def test_a_slow_link_is_no_dribble(pair: Pair) -> None:
    source, destination = pair.source(CountingMachine(pages=32)), pair.destination(CountingMachine(32, incoming=True))
    counting(source).block.pages[:, 8:] = 1
    destination.set_parameters({"x-migfw-incoming-timeout": 3000})
    source.set_parameters({"max-bandwidth": 32_000, "downtime-limit": 9000})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    runs_on(destination)


# -- cancel, and another address ---------------------------------------------------------------------------------------


def cancelled(engine: Engine) -> None:
    assert engine.incoming.wait(CANCELLED, PATIENCE), engine.incoming.status
    assert query_migrate(engine) == {"status": "cancelled"}
    assert engine.machine.run_state is RunState.INMIGRATE


def refuses(uri: str) -> bool:
    try:
        with dialled(uri):
            return False
    except ConnectionRefusedError:
        return True


def test_cancel_frees_a_destination_that_waits(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    uri = destination.migrate_incoming(LISTEN)
    destination.cancel()
    cancelled(destination)
    assert refuses(uri)
    source.migrate(destination.migrate_incoming(uri))
    assert ended(source) == "completed"
    runs_on(destination)


def test_cancel_frees_a_destination_that_loads_and_tells_the_source(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert source.outgoing.wait(frozenset({MigrationStatus.PRE_SWITCHOVER}), PATIENCE)
    destination.cancel()
    assert ended(source) == "failed"
    assert query_migrate(source)["error-desc"].endswith("it was cancelled on the destination")
    runs_on(source)
    cancelled(destination)


def test_cancel_frees_a_destination_whose_source_reads_no_answers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PONG that the source does not read blocks the destination in a send, where no timeout applies."""
    monkeypatch.setattr(incoming, "CANCEL_SECONDS", 0.5)
    destination = pair.destination()
    sink = MemorySink()
    writer = StreamWriter(sink)
    for number in range(1000):
        write_command(writer, Command.PING, ping_payload(number))
    writer.flush()
    with dialled(destination.migrate_incoming("tcp:127.0.0.1:0")) as deaf:
        deaf.sendall(beginning() + command(Command.OPEN_RETURN_PATH))
        deaf.settimeout(0.5)
        with pytest.raises(TimeoutError):  # no room for a byte: the destination reads no more
            while True:
                deaf.send(sink.data)
        destination.cancel()
        cancelled(destination)


def test_another_address_takes_the_place_of_the_first(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    first = destination.migrate_incoming(LISTEN)
    with pytest.raises(UriError):
        destination.migrate_incoming("tcp:nowhere")
    assert destination.incoming.status == "setup", "a wrong address changes nothing"
    with dialled(first) as idle:
        second = destination.migrate_incoming(LISTEN)
        ended_by_destination(idle)
    assert first != second and refuses(first) and destination.inbound.uri == second
    again = destination.migrate_incoming(second)
    assert again == second, "the same address may be waited at again"
    source.migrate(second)
    assert (ended(source), destination.wait_incoming(PATIENCE)) == ("completed", "completed")
    runs_on(destination)
    with pytest.raises(StateError):
        destination.migrate_incoming("tcp:127.0.0.1:0")


def test_cancel_changes_nothing_where_the_guest_is_here(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert (ended(source), arrived(destination)) == ("completed", "completed")
    destination.cancel()
    assert destination.incoming.status == "completed"
    runs_on(destination)
