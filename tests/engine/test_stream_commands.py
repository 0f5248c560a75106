"""Stream commands that a plugin defines: from the saver of a section to its loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from corefw.section import OutgoingContext
from corefw.wire.constants import PLUGIN_COMMANDS, Command
from corefw.wire.stream import StreamWriter
from tests.engine.test_plugin_sections import Loader, Saver, pair_with
from tests.helpers.engines import arrived, ended, outcome, query_migrate, runs_on

MARK = PLUGIN_COMMANDS[5]
PAYLOAD = b"between two sections"


class Commanding(Saver):
    """Sends one command after its START, and one after its END."""

    number: int = MARK

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        super().setup(writer, context)
        self._context = context
        context.send_command(self.number, PAYLOAD)

    def complete(self, writer: StreamWriter) -> None:
        super().complete(writer)
        self._context.send_command(self.number, PAYLOAD)


class Obeying(Loader):
    """Accepts commands of one number."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def commands(self) -> Mapping[int, Callable[[bytes], None]]:
        return {MARK: self.taken.append}


def test_a_loader_takes_the_commands_of_its_saver() -> None:
    pair, plugin = pair_with(Commanding, Obeying)
    with pair:
        assert outcome(pair) == ""
    (taken,) = (loader.taken for loader in plugin.loaders if isinstance(loader, Obeying) and loader.taken)
    assert taken == [PAYLOAD, PAYLOAD]


def test_a_command_that_no_loader_takes_fails_the_migration() -> None:
    pair, _ = pair_with(Commanding, Loader)
    with pair:
        assert "expected a command that is known here, got 0x7005" in outcome(pair)


class Troubled(Obeying):
    def commands(self) -> Mapping[int, Callable[[bytes], None]]:
        def fail(payload: bytes) -> None:
            raise RuntimeError("a bug in the handler")

        return {MARK: fail}


def test_a_handler_that_raises_fails_the_migration() -> None:
    pair, _ = pair_with(Commanding, Troubled)
    with pair:
        assert "RuntimeError: a bug in the handler" in outcome(pair)


class OfQemu(Commanding):
    """Sends a command of QEMU's that the engine does not handle itself."""

    number = Command.ENABLE_COLO

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        Saver.setup(self, writer, context)
        self._context = context
        context.send_command(self.number, b"")

    def complete(self, writer: StreamWriter) -> None:
        Saver.complete(self, writer)


class TakingQemus(Obeying):
    def commands(self) -> Mapping[int, Callable[[bytes], None]]:
        return {Command.ENABLE_COLO: self.taken.append}


def test_a_section_may_have_a_command_of_qemus() -> None:
    """The engine does not handle this command itself."""
    pair, plugin = pair_with(OfQemu, TakingQemus)
    with pair:
        assert outcome(pair) == ""
    assert [loader.taken for loader in plugin.loaders if isinstance(loader, Obeying) and loader.taken] == [[b""]]


class Second(Obeying):
    idstr = "second"


class Greedy(Obeying):
    def commands(self) -> Mapping[int, Callable[[bytes], None]]:
        return {Command.PING: self.taken.append}


class OutOfRange(Obeying):
    def commands(self) -> Mapping[int, Callable[[bytes], None]]:
        return {99: self.taken.append}


@pytest.mark.parametrize(
    "loaders", [(Obeying, Second), (Greedy,), (OutOfRange,)], ids=["taken already", "the engine's", "no command"]
)
def test_a_number_has_one_owner(loaders: tuple[type[Loader], ...]) -> None:
    pair, _ = pair_with(Saver, *loaders)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
        assert "is not free for it" in query_migrate(destination)["error-desc"]
        runs_on(source)
