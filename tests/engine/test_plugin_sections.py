"""The engine and the sections of a plugin: extra channels, budgets, cleaning up, the outcome."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from corefw.channel import Channel, receive_exactly
from corefw.hookspecs import hookimpl
from corefw.machine import Machine
from corefw.plugins import Plugins
from corefw.section import (
    IncomingContext,
    LiveLoader,
    LiveSaver,
    MultiChannelLoader,
    OutgoingContext,
    Pending,
    Priority,
    RamSaver,
    RamStatistics,
    SectionLoader,
    SectionSaver,
    StateLoader,
    StateSaver,
)
from corefw.settings import Settings
from corefw.wire.stream import StreamReader, StreamWriter
from tests.helpers.engines import PATIENCE, Pair, arrived, counting, ended, query_migrate, runs_on

DATA = bytes(range(256)) * 64


class Saver(LiveSaver):
    """A minimal live section, which tests extend."""

    idstr = "side"
    version_id = 1
    priority = Priority.EARLY

    def active(self) -> bool:
        return True

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        pass

    def pending_estimate(self) -> Pending:
        return Pending(0, 0)

    def pending_exact(self) -> Pending:
        return self.pending_estimate()

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        return True

    def complete(self, writer: StreamWriter) -> None:
        pass

    def cleanup(self) -> None:
        pass


class Loader(LiveLoader):
    """Reads what Saver writes."""

    idstr = "side"
    version_id = minimum_version = 1

    def required(self) -> bool:
        return True

    def setup(self, context: IncomingContext) -> None:
        pass

    def load(self, reader: StreamReader, version_id: int) -> None:
        pass

    def cleanup(self) -> None:
        pass


class Plugin:
    """Contributes these sections: new ones for each migration."""

    def __init__(self, *kinds: type[SectionSaver | SectionLoader]) -> None:
        self._kinds = kinds
        self.savers: list[SectionSaver] = []
        self.loaders: list[SectionLoader] = []

    @hookimpl
    def corefw_section_savers(self) -> Sequence[SectionSaver]:
        savers = [kind() for kind in self._kinds if issubclass(kind, SectionSaver)]
        self.savers += savers
        return savers

    @hookimpl
    def corefw_section_loaders(self) -> Sequence[SectionLoader]:
        loaders = [kind() for kind in self._kinds if issubclass(kind, SectionLoader)]
        self.loaders += loaders
        return loaders


def pair_with(*kinds: type[SectionSaver | SectionLoader]) -> tuple[Pair, Plugin]:
    plugins = Plugins.load()
    plugin = Plugin(*kinds)
    plugins.register(plugin, "sections")
    return Pair(plugins), plugin


class SendsOverAChannel(Saver):
    """Sends its data over a channel of its own."""

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        channel = context.open_channel()
        channel.send(DATA)


class TakesAChannel(Loader, MultiChannelLoader):
    received = b""

    def takes_channels(self) -> bool:
        return True

    def setup(self, context: IncomingContext) -> None:
        self._context = context

    def load(self, reader: StreamReader, version_id: int) -> None:
        if not self.received:
            view = memoryview(bytearray(len(DATA)))
            receive_exactly(self._context.accept_channel(), view)
            self.received = bytes(view)


def test_a_section_may_have_channels_of_its_own() -> None:
    pair, plugin = pair_with(SendsOverAChannel, TakesAChannel)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("completed", "completed")
        (loader,) = plugin.loaders
        assert isinstance(loader, TakesAChannel)
        assert loader.received == DATA
        runs_on(destination)


class Stuck(Saver):
    """Waits in a thread of its own for bytes that never come; the engine's thread waits for that thread."""

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self._waiting = threading.Thread(target=self._wait, args=(context.open_channel(),))
        self._waiting.start()
        self._waiting.join()

    def _wait(self, channel: Channel) -> None:
        with pytest.raises(Exception, match="cancelled"):
            channel.receive_into(memoryview(bytearray(1)))


def test_a_cancel_wakes_a_savers_thread_too() -> None:
    pair, plugin = pair_with(Stuck, TakesAChannel)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        while not any(hasattr(saver, "_waiting") for saver in plugin.savers):
            threading.Event().wait(0.01)
        source.cancel()
        assert ended(source) == "cancelled"
        runs_on(source)
        assert arrived(destination) == "failed"


class Untidy(Loader):
    def cleanup(self) -> None:
        raise RuntimeError("oops")


class SendsToRefusing(Saver):
    idstr = "refusing"


class Refusing(Loader):
    """Cleaned up after the untidy one."""

    idstr = "refusing"
    cleaned = 0

    def load(self, reader: StreamReader, version_id: int) -> None:
        raise reader.error("a better section", "this one")

    def cleanup(self) -> None:
        Refusing.cleaned += 1


def test_a_cleanup_that_raises_hides_no_cause() -> None:
    Refusing.cleaned = 0
    pair, _ = pair_with(Saver, SendsToRefusing, Untidy, Refusing)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
        reason = query_migrate(destination)["error-desc"]
        assert "expected a better section" in reason
        assert "oops" not in reason
        assert Refusing.cleaned == 1
        runs_on(source)


class Counting(Saver, RamSaver):
    """Counts pages, as section 'ram' does."""

    def ram_statistics(self) -> RamStatistics:
        return RamStatistics()


def test_two_that_count_the_pages_are_one_too_many() -> None:
    pair, _ = pair_with(Counting, Loader)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert ended(source) == "failed"
        assert "two section savers count the RAM's pages" in query_migrate(source)["error-desc"]
        runs_on(source)


class Early(Saver):
    """Always has something to send, and uses as much of the budget as it may; the RAM gets the rest."""

    budgets: list[int] = []  # noqa: RUF012 - emptied by the test

    def pending_estimate(self) -> Pending:
        return Pending(0 if self.budgets else 1 << 30, 0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        Early.budgets.append(budget)
        writer.write(bytes(budget // 2))
        return True


class Later(Early):
    idstr = "later"

    budgets: list[int] = []  # noqa: RUF012

    def pending_estimate(self) -> Pending:
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
    def corefw_section_savers(self, machine: Machine, settings: Settings) -> Iterator[SectionSaver]:
        if self.broken:
            raise RuntimeError("oops")
        return iter(())


def test_a_plugin_that_breaks_is_in_the_way_and_does_not_break_queries() -> None:
    plugins = Plugins.load()
    plugin = Failing()
    plugins.register(plugin, "failing")
    with Pair(plugins) as own:
        source = own.source()
        assert "blocked-reasons" not in query_migrate(source)
        plugin.broken = True
        (reason,) = query_migrate(source)["blocked-reasons"]
        assert "'failing'" in reason
        assert "oops" in reason


class Indescribable(StateSaver):
    """Its description is not valid JSON."""

    idstr = "odd"
    version_id = 1
    priority = Priority.DEVICES

    def blocked(self) -> str | None:
        return None

    def needed(self) -> bool:
        return True

    def save(self, writer: StreamWriter) -> None:
        writer.u8(1)

    def describe(self) -> dict[str, Any]:
        return {"vmsd_name": "odd", "version": 1, "fields": [{"name": object()}]}


class IndescribableLoader(StateLoader):
    idstr = "odd"
    version_id = minimum_version = 1

    def required(self) -> bool:
        return False

    def setup(self, context: IncomingContext) -> None:
        pass

    def load(self, reader: StreamReader, version_id: int) -> None:
        reader.u8("it")

    def cleanup(self) -> None:
        pass


def test_what_cannot_be_described_fails_before_the_guest_is_handed_over() -> None:
    pair, _ = pair_with(Indescribable, IndescribableLoader)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
        assert "not JSON serializable" in query_migrate(source)["error-desc"]
        runs_on(source)


class Bulky(Saver):
    """Sends 4 MiB that are not RAM, as fast as it may."""

    idstr = "bulky"
    size = 4 << 20

    def __init__(self) -> None:
        self.left = self.size

    def pending_estimate(self) -> Pending:
        return Pending(self.left, 0)

    def statistics(self) -> Mapping[str, object]:
        return {"half-way": self.left <= self.size // 2, "sent": "a name that the engine has"}

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        count = min(self.left, budget)
        writer.be32(count)
        writer.write(bytes(count))
        self.left -= count
        return not self.left

    def complete(self, writer: StreamWriter) -> None:
        writer.be32(self.left)
        writer.write(bytes(self.left))


class BulkyLoader(Loader):
    idstr = "bulky"

    def __init__(self) -> None:
        self.received = 0
        self._begun = False

    def statistics(self) -> Mapping[str, object]:
        return {"received": self.received}

    def load(self, reader: StreamReader, version_id: int) -> None:
        if count := reader.be32("the size of a piece") if self._begun else 0:
            self.received += len(reader.read(count, "a piece"))
        self._begun = True


def test_progress_is_that_of_every_section() -> None:
    pair, _ = pair_with(Bulky, BulkyLoader)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.set_parameters({"max-bandwidth": 4 << 20})
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        seen = []
        while (answer := query_migrate(source))["status"] in ("setup", "active"):
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
        own = query_migrate(source)["x-migfw"]
        assert own["remaining"] == 0
        assert own["sections"]["bulky"]["sent"] >= Bulky.size
        assert own["sections"]["bulky"]["half-way"] is True
        assert query_migrate(destination)["x-migfw"]["sections"] == {"bulky": {"received": Bulky.size}}
        assert own["sections"]["counter"]["sent"] > 0, "devices are counted as well"
        runs_on(destination)


class Cancelled(Saver):
    """Raises a BaseException that is not an Exception, at the switchover or in load()."""

    def complete(self, writer: StreamWriter) -> None:
        raise asyncio.CancelledError("broken off")


class CancelledThere(Loader):
    def load(self, reader: StreamReader, version_id: int) -> None:
        raise asyncio.CancelledError("broken off")


@pytest.mark.parametrize("kinds", [(Cancelled, Loader), (Saver, CancelledThere)], ids=["saver", "loader"])
def test_what_is_no_exception_ends_a_migration_and_the_guest_runs_on(
    kinds: tuple[type[SectionSaver | SectionLoader], ...],
) -> None:
    pair, _ = pair_with(*kinds)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("failed", "failed")
        assert "CancelledError: broken off" in query_migrate(source)["error-desc"]
        runs_on(source)


# -- the outcome ---------------------------------------------------------------------------------------------------


class Witness:
    """Records its calls in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def cleanup(self) -> None:
        self.calls.append("cleanup")

    def committed(self) -> None:
        self.calls.append("committed")
        raise RuntimeError("which changes nothing")

    def abandoned(self) -> None:
        self.calls.append("abandoned")
        raise RuntimeError("which changes nothing")


class LiveWitness(Witness, Saver):
    pass


class IdleWitness(Witness, Saver):
    idstr = "idle"

    def active(self) -> bool:
        return False


class StateWitness(Witness, Indescribable):
    def needed(self) -> bool:
        return False


class LoadingWitness(Witness, Loader):
    pass


class AbsentWitness(Witness, IndescribableLoader):
    """Its section does not come."""


WITNESSES = (LiveWitness, IdleWitness, StateWitness, LoadingWitness, AbsentWitness)


def calls(plugin: Plugin) -> dict[str, list[str]]:
    """The calls of each witness of the migration that was called at all."""
    witnesses = [one for one in (*plugin.savers, *plugin.loaders) if isinstance(one, Witness) and one.calls]
    return {type(one).__name__: one.calls for one in witnesses}


def test_sections_learn_that_a_migration_took_place() -> None:
    pair, plugin = pair_with(*WITNESSES)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("completed", "completed")
        runs_on(destination)
    assert calls(plugin) == {
        "LiveWitness": ["cleanup", "committed"],
        "StateWitness": ["committed"],
        "LoadingWitness": ["cleanup", "committed"],
        "AbsentWitness": ["cleanup", "committed"],
    }


def test_a_source_that_cannot_know_keeps_what_it_has() -> None:
    """Without a return path the migration completes, but the guest may be lost, so the source keeps what it has."""
    pair, plugin = pair_with(*WITNESSES)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.set_capabilities({"return-path": False})
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("completed", "completed")
    assert calls(plugin) == {
        "LiveWitness": ["cleanup", "abandoned"],
        "StateWitness": ["abandoned"],
        "LoadingWitness": ["cleanup", "committed"],
        "AbsentWitness": ["cleanup", "committed"],
    }


@pytest.mark.parametrize("where", ["source", "destination"])
def test_sections_learn_that_a_migration_was_abandoned(where: str) -> None:
    pair, plugin = pair_with(*WITNESSES)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.set_parameters({"max-bandwidth": 1 << 16})
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        while query_migrate(source)["status"] != "active":
            threading.Event().wait(0.01)
        (source if where == "source" else destination).cancel()
        assert ended(source) in ("cancelled", "failed")
        assert destination.wait_incoming(PATIENCE) in ("cancelled", "failed")
        runs_on(source)
    assert calls(plugin) == {
        "LiveWitness": ["cleanup", "abandoned"],
        "StateWitness": ["abandoned"],
        "LoadingWitness": ["cleanup", "abandoned"],
        "AbsentWitness": ["cleanup", "abandoned"],
    }


class BadFigures(Saver):
    def statistics(self) -> Mapping[str, object]:
        return {"figure": object()}


def test_a_section_without_figures_does_not_break_queries() -> None:
    pair, _ = pair_with(BadFigures, Loader)
    with pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert (ended(source), arrived(destination)) == ("completed", "completed")
        assert set(query_migrate(source)["x-migfw"]["sections"]["side"]) == {"total", "remaining", "sent"}
