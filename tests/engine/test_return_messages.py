"""Return-path messages that a plugin defines: from the loader of a section to its saver."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

import pytest

from corefw.section import IncomingContext
from corefw.wire.constants import PLUGIN_MESSAGES, Command, ReturnMessage, SectionType
from corefw.wire.records import (
    Configuration,
    SectionHeader,
    write_command,
    write_configuration,
    write_header,
    write_section_header,
)
from corefw.wire.stream import MemorySink, StreamReader, StreamWriter
from tests.engine.test_plugin_sections import Loader, Saver, pair_with
from tests.helpers.engines import arrived, outcome, query_migrate

PROGRESS = PLUGIN_MESSAGES[1]
HEARD = b"what has been loaded"


class Hearing(Saver):
    """Accepts messages of one number."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def return_messages(self) -> Mapping[int, Callable[[bytes], None]]:
        return {PROGRESS: self.heard.append}


class Saying(Loader):
    """Sends such a message for each body that it loads."""

    def setup(self, context: IncomingContext) -> None:
        self._context = context

    def load(self, reader: StreamReader, version_id: int) -> None:
        self._context.send_return_message(PROGRESS, HEARD)


def test_a_saver_hears_what_its_loader_sends() -> None:
    pair, plugin = pair_with(Hearing, Saying)
    with pair:
        assert outcome(pair) == ""
    (heard,) = (saver.heard for saver in plugin.savers if isinstance(saver, Hearing) and saver.heard)
    assert len(heard) >= 2 and set(heard) == {HEARD}, "one for START and one for END at least"


def test_a_message_that_no_saver_takes_fails_the_migration() -> None:
    pair, _ = pair_with(Saver, Saying)
    with pair:
        assert f"got type {PROGRESS}" in outcome(pair)


class Troubled(Hearing):
    def return_messages(self) -> Mapping[int, Callable[[bytes], None]]:
        def fail(body: bytes) -> None:
            raise RuntimeError("a bug in the handler")

        return {PROGRESS: fail}


def test_a_handler_that_raises_fails_the_migration() -> None:
    pair, _ = pair_with(Troubled, Saying)
    with pair:
        assert "RuntimeError: a bug in the handler" in outcome(pair)


class Second(Hearing):
    idstr = "second"


class Greedy(Hearing):
    def return_messages(self) -> Mapping[int, Callable[[bytes], None]]:
        return {ReturnMessage.SHUT: self.heard.append}


@pytest.mark.parametrize("others", [(Hearing, Second), (Greedy,)], ids=["taken already", "the engine's"])
def test_a_number_has_one_owner(others: tuple[type[Saver], ...]) -> None:
    pair, _ = pair_with(*others)
    with pair:
        assert "return-path message" in outcome(pair)


class Talkative(Loader):
    """Sends messages until that fails."""

    def setup(self, context: IncomingContext) -> None:
        self._context = context

    def load(self, reader: StreamReader, version_id: int) -> None:
        while True:
            self._context.send_return_message(PROGRESS, bytes(512))


def test_a_source_that_takes_no_messages_is_given_up() -> None:
    pair, _ = pair_with(Talkative)
    with pair:
        destination = pair.destination()
        destination.set_parameters({"x-migfw-incoming-timeout": 500})
        port = int(destination.migrate_incoming("tcp:127.0.0.1:0").rpartition(":")[2])
        sink = MemorySink()
        writer = StreamWriter(sink)
        write_header(writer)
        write_configuration(writer, Configuration("counting"))
        write_command(writer, Command.OPEN_RETURN_PATH)
        write_section_header(writer, SectionHeader(SectionType.START, 0, Talkative.idstr, 0, Talkative.version_id))
        writer.flush()
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full
            deaf.connect(("127.0.0.1", port))
            deaf.sendall(sink.data)
            assert arrived(destination) == "failed"
        reason = query_migrate(destination)["error-desc"]
    assert "took no message of the return path in 0.5 s (parameter x-migfw-incoming-timeout)" in reason
