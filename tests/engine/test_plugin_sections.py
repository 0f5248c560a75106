"""What the engine does for section handlers of a plugin: channels beside the stream, budgets, cleaning up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from corefw.channel import Channel, receive_exactly
from corefw.hookspecs import hookimpl
from corefw.machine import Machine
from corefw.plugins import Plugins
from corefw.section import (
    IncomingContext,
    LiveHandler,
    OutgoingContext,
    Pending,
    Priority,
    RamStatistics,
    SectionHandler,
    StateHandler,
)
from corefw.settings import Settings
from corefw.wire.stream import StreamReader, StreamWriter
from tests.helpers.engines import Pair, arrived, counting, ended, runs_on

DATA = bytes(range(256)) * 64


class Section(LiveHandler):
    """A live section of the source's or the destination's that says nothing; tests say more."""

    idstr = "side"
    version_id = minimum_version = 1
    priority = Priority.EARLY

    def active(self) -> bool:
        return True

    def required(self) -> bool:
        return True

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        pass

    def pending(self, threshold: int) -> Pending:
        return Pending(0, 0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        return True

    def complete_precopy(self, writer: StreamWriter) -> None:
        pass

    def cleanup(self) -> None:
        pass

    def load_setup(self, context: IncomingContext) -> None:
        pass

    def load(self, reader: StreamReader, version_id: int) -> None:
        pass

    def load_cleanup(self) -> None:
        pass


class Plugin:
    """Contributes these handlers: one list for each migration, made anew."""

    def __init__(self, *kinds: type[SectionHandler]) -> None:
        self._kinds = kinds
        self.made: list[SectionHandler] = []

    @hookimpl
    def corefw_section_handlers(self, machine: Machine, settings: Settings) -> Sequence[SectionHandler]:
        handlers = [kind() for kind in self._kinds]
        self.made += handlers
        return handlers


def pair_with(*kinds: type[SectionHandler]) -> tuple[Pair, Plugin]:
    plugins = Plugins.load()
    plugin = Plugin(*kinds)
    plugins.register(plugin, "sections")
    return Pair(plugins), plugin


class Channelled(Section):
    """Its data goes over a channel of its own."""

    received = b""

    def takes_channels(self) -> bool:
        return True

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        channel = context.open_channel()
        channel.send(DATA)

    def load_setup(self, context: IncomingContext) -> None:
        self._context = context

    def load(self, reader: StreamReader, version_id: int) -> None:
        if not self.received:
            view = memoryview(bytearray(len(DATA)))
            receive_exactly(self._context.accept_channel(), view)
            Channelled.received = bytes(view)


def test_a_handler_may_have_channels_of_its_own() -> None:
    Channelled.received = b""
    pair, _ = pair_with(Channelled)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("completed", "completed")
        assert Channelled.received == DATA
        runs_on(destination)


class Stuck(Section):
    """Waits for ever, in a thread of its own, for bytes that never come; the engine's own thread waits for that."""

    def takes_channels(self) -> bool:
        return True

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self._waiting = threading.Thread(target=self._wait, args=(context.open_channel(),))
        self._waiting.start()
        self._waiting.join()

    def _wait(self, channel: Channel) -> None:
        with pytest.raises(Exception, match="cancelled"):
            channel.receive_into(memoryview(bytearray(1)))


def test_a_cancel_wakes_a_handlers_thread_too() -> None:
    pair, plugin = pair_with(Stuck)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        while not any(hasattr(handler, "_waiting") for handler in plugin.made):
            threading.Event().wait(0.01)
        source.cancel()
        assert ended(source) == "cancelled"
        runs_on(source)
        assert arrived(destination) == "failed"


class Untidy(Section):
    def load_cleanup(self) -> None:
        raise RuntimeError("oops")


class Refusing(Section):
    """Behind the RAM, so that it is cleaned up after the untidy one."""

    idstr = "refusing"
    priority = Priority.LATE
    cleaned = 0

    def load(self, reader: StreamReader, version_id: int) -> None:
        raise reader.error("a better section", "this one")

    def load_cleanup(self) -> None:
        Refusing.cleaned += 1


def test_a_cleanup_that_raises_hides_no_cause() -> None:
    Refusing.cleaned = 0
    pair, _ = pair_with(Untidy, Refusing)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
        reason = destination.query_migrate()["error-desc"]
        assert "expected a better section" in reason
        assert "oops" not in reason
        assert Refusing.cleaned == 1
        runs_on(source)


class Counting(Section):
    """Counts pages, as section 'ram' does."""

    def ram_statistics(self) -> RamStatistics:
        return RamStatistics()


def test_two_that_count_the_pages_are_one_too_many() -> None:
    pair, _ = pair_with(Counting)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert ended(source) == "failed"
        assert "two section handlers count the RAM's pages" in source.query_migrate()["error-desc"]
        runs_on(source)


class Early(Section):
    """Has something to send all the time, and sends as much as it may; then the RAM may send what is left of that."""

    budgets: list[int] = []  # noqa: RUF012 - emptied by the test

    def pending(self, threshold: int) -> Pending:
        return Pending(0 if self.budgets else 1 << 30, 0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        Early.budgets.append(budget)
        writer.write(bytes(budget // 2))
        return True

    def load(self, reader: StreamReader, version_id: int) -> None:
        pass


class Later(Early):
    idstr = "later"

    budgets: list[int] = []  # noqa: RUF012

    def pending(self, threshold: int) -> Pending:
        return Pending(0, 0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        Later.budgets.append(budget)
        return True


def test_one_budget_is_shared_by_all() -> None:
    Early.budgets.clear()
    Later.budgets.clear()
    pair, _ = pair_with(Early, Later)
    with pair:
        source = pair.source()
        source.set_capabilities({"return-path": False})
        source.migrate("exec:cat >/dev/null")
        assert ended(source) == "completed"
    assert Early.budgets
    for mine, rest in zip(Early.budgets, Later.budgets, strict=True):
        assert rest <= mine - mine // 2


class Failing:
    def __init__(self) -> None:
        self.broken = False

    @hookimpl
    def corefw_section_handlers(self, machine: Machine, settings: Settings) -> Iterator[SectionHandler]:
        if self.broken:
            raise RuntimeError("oops")
        return iter(())


def test_a_plugin_that_breaks_is_in_the_way_and_does_not_break_queries() -> None:
    plugins = Plugins.load()
    plugin = Failing()
    plugins.register(plugin, "failing")
    with Pair(plugins) as own:
        source = own.source()
        assert "blocked-reasons" not in source.query_migrate()
        plugin.broken = True
        (reason,) = source.query_migrate()["blocked-reasons"]
        assert "'failing'" in reason
        assert "oops" in reason


class Indescribable(StateHandler):
    """What it says of itself is no JSON."""

    idstr = "odd"
    version_id = minimum_version = 1
    priority = Priority.DEVICES

    def required(self) -> bool:
        return False

    def blocked(self) -> str | None:
        return None

    def needed(self) -> bool:
        return True

    def save(self, writer: StreamWriter) -> None:
        writer.u8(1)

    def describe(self) -> dict[str, Any]:
        return {"vmsd_name": "odd", "version": 1, "fields": [{"name": object()}]}

    def load_setup(self, context: IncomingContext) -> None:
        pass

    def load(self, reader: StreamReader, version_id: int) -> None:
        reader.u8("it")

    def load_cleanup(self) -> None:
        pass


def test_what_cannot_be_described_fails_before_the_guest_is_handed_over() -> None:
    pair, _ = pair_with(Indescribable)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
        assert "not JSON serializable" in source.query_migrate()["error-desc"]
        runs_on(source)


class Bulky(Section):
    """A job with much data that is no RAM: it sends 4 MiB, as fast as it may."""

    idstr = "bulky"
    size = 4 << 20

    def __init__(self) -> None:
        self.left = self.size

    def pending(self, threshold: int) -> Pending:
        return Pending(self.left, 0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        count = min(self.left, budget)
        writer.be32(count)
        writer.write(bytes(count))
        self.left -= count
        return not self.left

    def complete_precopy(self, writer: StreamWriter) -> None:
        writer.be32(self.left)
        writer.write(bytes(self.left))

    def load(self, reader: StreamReader, version_id: int) -> None:
        if count := reader.be32("the size of a piece") if self.begun else 0:
            reader.read(count, "a piece")
        self.begun = True

    begun = False


def test_progress_is_that_of_every_handler() -> None:
    pair, _ = pair_with(Bulky)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.set_parameters({"max-bandwidth": 4 << 20})
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        seen = []
        while (answer := source.query_migrate())["status"] in ("setup", "active"):
            seen.append(answer["x-migfw"])
            threading.Event().wait(0.02)
        assert (ended(source), arrived(destination)) == ("completed", "completed")
        halfway = [
            one for one in seen if 1 << 20 < one["sections"].get("bulky", {"remaining": 0})["remaining"] < 3 << 20
        ]
        assert halfway, "the job shows how far it is"
        for one in halfway:
            assert one["total"] == Bulky.size + counting(source).block.length
            assert one["remaining"] >= one["sections"]["bulky"]["remaining"]
            assert one["sections"]["bulky"]["total"] == Bulky.size
        assert any(one.get("pass-time-left", 0) > 0 for one in halfway)
        own = source.query_migrate()["x-migfw"]
        assert own["remaining"] == 0
        assert own["sections"]["bulky"]["sent"] >= Bulky.size
        assert own["sections"]["counter"]["sent"] > 0, "devices are counted as well"
        runs_on(destination)


class Cancelled(Section):
    """Raises what is no Exception, at the switchover or where it is loaded."""

    def complete_precopy(self, writer: StreamWriter) -> None:
        raise asyncio.CancelledError("broken off")


class CancelledThere(Section):
    def load(self, reader: StreamReader, version_id: int) -> None:
        raise asyncio.CancelledError("broken off")


@pytest.mark.parametrize("kind", [Cancelled, CancelledThere])
def test_what_is_no_exception_ends_a_migration_and_the_guest_runs_on(kind: type[SectionHandler]) -> None:
    pair, _ = pair_with(kind)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
        assert "CancelledError: broken off" in source.query_migrate()["error-desc"]
        runs_on(source)
