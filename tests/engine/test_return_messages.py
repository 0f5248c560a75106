"""Return-path messages that a plugin defines: from the loader of a section to its saver."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from corefw.section import IncomingContext
from corefw.wire.constants import PLUGIN_MESSAGES, ReturnMessage
from corefw.wire.stream import StreamReader
from tests.engine.test_plugin_sections import Loader, Saver, pair_with
from tests.helpers.engines import Pair, arrived, ended, query_migrate, runs_on

PROGRESS = PLUGIN_MESSAGES[1]
HEARD = b"what has been loaded"


class Hearing(Saver):
    """Takes messages of one number."""

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


def outcome(pair: Pair) -> str:
    """Of a migration whose source runs on if it failed; "" or the source's error."""
    source, destination = pair.source(), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    if ended(source) == "completed":
        assert arrived(destination) == "completed"
        runs_on(destination)
        return ""
    runs_on(source)
    return str(query_migrate(source)["error-desc"])


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
