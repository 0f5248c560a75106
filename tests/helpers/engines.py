"""A source and a destination in one process, and peers driven by hand, for tests of the engine."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Any, Self

from corefw.dispatch import Event
from corefw.engine import Engine
from corefw.machine import Machine, RunState
from corefw.plugins import Plugins
from corefw.qmp.answers import migration_info
from corefw.states import MigrationStatus, StatusChanged
from corefw.wire.constants import READY_PING, Command, ReturnMessage, SectionType
from corefw.wire.returnpath import encode_return_message, number_body
from tests.helpers.machines import CountingMachine

PATIENCE = 60.0
"""Seconds for one step, far beyond what it takes."""
OPEN = bytes((SectionType.COMMAND, 0, Command.OPEN_RETURN_PATH, 0, 0))
PING = bytes((SectionType.COMMAND, 0, Command.PING, 0, 4))
READY = PING + number_body(READY_PING)
RAM = b"\3ram"


class Pair:
    """Creates a source and a destination. Closes them at the end of the block."""

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins
        self._stack = ExitStack()
        self.events: list[Event] = []

    def engine(self, machine: Machine, properties: Mapping[str, bool]) -> Engine:
        settings = self.plugins.settings()
        for name, state in properties.items():
            settings.set_property(name, state)
        settings.set_capabilities({"events": True, "return-path": True})
        settings.set_parameters({"max-bandwidth": 0})
        engine = Engine(machine, self.plugins, settings)
        self._stack.callback(engine.close)
        return engine

    def source(
        self,
        machine: CountingMachine | None = None,
        *,
        running: bool = True,
        properties: Mapping[str, bool] = MappingProxyType({}),
    ) -> Engine:
        machine = machine or CountingMachine()
        engine = self.engine(machine, properties)
        engine.observe(self.events.append)
        if running:
            machine.start()
        return engine

    def destination(
        self, machine: CountingMachine | None = None, *, properties: Mapping[str, bool] = MappingProxyType({})
    ) -> Engine:
        return self.engine(machine or CountingMachine(incoming=True), properties)

    def statuses(self, last: str | None = None) -> list[str]:
        """The source's statuses in the order of their events. With `last`, waits for its event."""
        deadline = time.monotonic() + PATIENCE
        while True:
            reported = [str(event.new) for event in self.events if isinstance(event, StatusChanged)]
            if last is None or reported[-1:] == [last]:
                return reported
            assert time.monotonic() < deadline, f"'{last}' was not reported, but {reported}"
            time.sleep(0.001)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def query_migrate(engine: Engine) -> dict[str, Any]:
    """The result of QMP's query-migrate."""
    return dict(migration_info(engine.report()))


def counting(engine: Engine) -> CountingMachine:
    assert isinstance(engine.machine, CountingMachine)
    return engine.machine


def ended(engine: Engine) -> MigrationStatus:
    """Wait for the end of the source's migration, and return its status."""
    status = engine.wait_outgoing(PATIENCE)
    assert status in ("completed", "failed", "cancelled"), f"the migration did not end: {status}"
    return status


def arrived(engine: Engine) -> MigrationStatus:
    status = engine.wait_incoming(PATIENCE)
    assert status in ("completed", "failed"), f"the migration did not end: {status}"
    return status


def runs_on(engine: Engine) -> None:
    """Check that the guest runs here, writes, and has lost nothing.

    An engine starts the guest again after the status of the migration has become final, so this waits for that.
    """
    machine = counting(engine)
    deadline = time.monotonic() + PATIENCE
    while machine.run_state is not RunState.RUNNING:
        assert time.monotonic() < deadline, f"the guest is {machine.run_state}"
        time.sleep(0.001)
    before = machine.state.writes
    while machine.state.writes == before:
        assert time.monotonic() < deadline, "the guest writes nothing"
        time.sleep(0.001)
    machine.stop(RunState.PAUSED)
    assert machine.check() > before


def answer_pings(connection: socket.socket) -> None:
    """Answer the PINGs at the start of a stream, as a destination does, without consuming them."""
    deadline = time.monotonic() + PATIENCE
    while READY not in (came := connection.recv(1 << 16, socket.MSG_PEEK)) and (OPEN in came or RAM not in came):
        assert time.monotonic() < deadline, "the source does not begin"
        time.sleep(0.001)
    for at in range(len(came) - len(READY) + 1):
        if came.startswith(PING, at):
            connection.sendall(encode_return_message(ReturnMessage.PONG, came[at + 5 : at + 9]))


def outcome(pair: Pair) -> str:
    """Migrate from a new source to a new destination. Returns "" if that completed; otherwise checks that the source's
    guest still runs, and returns the source's error."""
    source, destination = pair.source(), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    if ended(source) == "completed":
        assert arrived(destination) == "completed"
        runs_on(destination)
        return ""
    runs_on(source)
    return str(query_migrate(source)["error-desc"])


class Peer:
    """A destination that the test drives by hand. Listens on loopback and accepts one connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self.connection: socket.socket | None = None

    def accept(self, *, answer: bool = True) -> socket.socket:
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(PATIENCE)
        if answer:
            answer_pings(self.connection)
        return self.connection

    def read_all(self, until: Callable[[bytes], bool]) -> bytes:
        """Read until the data satisfies `until`."""
        assert self.connection is not None
        data = b""
        while not until(data):
            more = self.connection.recv(1 << 16)
            assert more, "the source ended its stream"
            data += more
        return data

    def read_while(self, condition: Callable[[], bool]) -> None:
        """Read and discard data while the condition holds."""
        assert self.connection is not None
        while condition():
            if select.select([self.connection], [], [], 0.01)[0]:
                self.connection.recv(1 << 16)

    def say(self, message: ReturnMessage, value: int) -> None:
        self.send(encode_return_message(message, number_body(value)))

    def send(self, data: bytes) -> None:
        assert self.connection is not None
        self.connection.sendall(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        if self.connection is not None:
            self.connection.close()
