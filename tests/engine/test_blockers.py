"""Blockers are asked without a lock. query-migrate does not wait for slow ones; migrate does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from corefw.channel import Transport, TransportContext
from corefw.errors import BlockedError, UriError
from corefw.hookspecs import hookimpl
from corefw.plugins import Plugins
from corefw.uri import MigrationUri
from tests.helpers.engines import PATIENCE, Pair, ended, query_migrate


class Slow:
    """A plugin whose blockers and transport take as long as the test wants, and then return what it wants."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.entered = threading.Event()
        self.reasons: list[str] = []

    def _wait(self) -> None:
        self.entered.set()
        assert self.go_on.wait(PATIENCE)

    @hookimpl
    def corefw_blockers(self) -> list[str]:
        reasons = list(self.reasons)
        self._wait()
        return reasons

    @hookimpl
    def corefw_transport(self, uri: MigrationUri, context: TransportContext) -> Transport | None:
        if uri.scheme == "x-slow":
            self._wait()
            raise UriError("too late")
        return None


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def slow_pair(slow: Slow) -> Iterator[Pair]:
    plugins = Plugins.load()
    plugins.register(slow, "slow")
    with Pair(plugins) as pair:
        yield pair
        slow.go_on.set()


def elsewhere(deed: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=deed, daemon=True)
    thread.start()
    return thread


def test_query_migrate_gives_the_last_answer_while_a_blocker_takes_its_time(slow_pair: Pair, slow: Slow) -> None:
    source = slow_pair.source()
    slow.reasons = ["attached to a GPU"]
    assert query_migrate(source) == {"blocked-reasons": ["attached to a GPU"]}, "the first answer is waited for"
    slow.reasons = []
    slow.go_on.clear()
    assert query_migrate(source) == {"blocked-reasons": ["attached to a GPU"]}
    source.add_blocker("added by hand")
    assert query_migrate(source) == {"blocked-reasons": ["added by hand", "attached to a GPU"]}
    source.remove_blocker("added by hand")
    slow.go_on.set()
    asking = [thread for thread in threading.enumerate() if thread.name == "blockers"]
    for thread in asking:
        thread.join(PATIENCE)
    assert query_migrate(source) == {}


def test_migrate_asks_anew(slow_pair: Pair, slow: Slow) -> None:
    source, destination = slow_pair.source(), slow_pair.destination()
    assert query_migrate(source) == {}
    slow.reasons = ["attached to a GPU"]
    with pytest.raises(BlockedError, match="attached to a GPU"):
        source.migrate("tcp:127.0.0.1:1")
    slow.reasons = []
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed"


@pytest.mark.parametrize("command", ["migrate", "check"])
def test_no_lock_is_held_while_plugins_are_asked(slow_pair: Pair, slow: Slow, command: str) -> None:
    source = slow_pair.source()
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            getattr(source, command)("x-slow:there")
        except UriError as error:
            errors.append(error)

    slow.go_on.clear()
    asking = elsewhere(ask)
    assert slow.entered.wait(PATIENCE)
    others = [
        elsewhere(lambda: source.set_capabilities({"events": True})),
        elsewhere(lambda: source.add_blocker("added by hand")),
        elsewhere(source.cancel),
    ]
    for other in others:
        other.join(PATIENCE)
        assert not other.is_alive(), "it waits for the one who asks"
    slow.go_on.set()
    asking.join(PATIENCE)
    assert [str(error) for error in errors] == ["too late"]


def test_a_blocker_that_was_added_meanwhile_counts(slow_pair: Pair, slow: Slow) -> None:
    source = slow_pair.source()
    errors: list[BaseException] = []

    def migrate() -> None:
        try:
            source.migrate("tcp:127.0.0.1:1")
        except BlockedError as error:
            errors.append(error)

    slow.go_on.clear()
    migrating = elsewhere(migrate)
    assert slow.entered.wait(PATIENCE)
    source.add_blocker("added by hand")
    slow.go_on.set()
    migrating.join(PATIENCE)
    assert [str(error) for error in errors] == ["cannot migrate: added by hand"]


def test_a_destination_listens_without_the_lock(slow_pair: Pair, slow: Slow) -> None:
    destination = slow_pair.destination()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            destination.migrate_incoming("x-slow:here")
        except UriError as error:
            errors.append(error)

    slow.go_on.clear()
    waiting = elsewhere(wait)
    assert slow.entered.wait(PATIENCE)
    assert destination.migrate_incoming("tcp:127.0.0.1:0").startswith("tcp:")
    slow.go_on.set()
    waiting.join(PATIENCE)
    assert [str(error) for error in errors] == ["too late"]
