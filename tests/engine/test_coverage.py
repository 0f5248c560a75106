"""A migration is complete or refused: no RAM block or device is silently left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.errors import BlockedError, UsageError
from corefw.hookspecs import hookimpl
from corefw.machine import MachineConfig
from corefw.plugins import Plugins
from corefw.section import Coverage, Section, SectionKey, SectionLoader, SectionSaver
from corefw.wire.constants import SectionType
from corefw.wire.records import Configuration, write_configuration, write_header
from corefw.wire.stream import MemorySink, StreamWriter
from tests.engine.test_plugin_sections import Loader, Saver
from tests.helpers.engines import Pair, arrived, ended, query_migrate, runs_on
from tests.helpers.installs import install
from tests.helpers.machines import CountingMachine


def plugins_without(*absent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plugins:
    for name in absent:
        monkeypatch.syspath_prepend(str(install(tmp_path / name, f"migfw-{name}")))
    return Plugins.load()


@pytest.mark.parametrize(("absent", "part"), [("ram", "RAM block 'counters'"), ("devices", "device 'counter'")])
def test_without_the_plugin_nothing_is_sent_or_waited_for(
    absent: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Pair(plugins_without(absent, monkeypatch=monkeypatch, tmp_path=tmp_path)) as pair:
        source, destination = pair.source(), pair.destination()
        (reason,) = query_migrate(source)["blocked-reasons"]
        assert part in reason and f"migfw-{absent}" in reason
        source.set_capabilities({"return-path": False})
        with pytest.raises(BlockedError, match=f"no plugin carries {part}"):
            source.migrate(f"file:{tmp_path}/guest")
        assert not (tmp_path / "guest").exists()
        runs_on(source)
        with pytest.raises(BlockedError, match=f"no plugin carries {part}"):
            destination.migrate_incoming("tcp:127.0.0.1:0")
        assert destination.incoming.status == "none"


def test_a_parked_machine_needs_somebody_who_loads_its_ram(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Pair(plugins_without("ram", monkeypatch=monkeypatch, tmp_path=tmp_path)) as pair:
        parked = pair.engine(pair.plugins.machine("qemu", MachineConfig(incoming=True)), {})
        with pytest.raises(BlockedError, match="no plugin carries whatever RAM the stream brings"):
            parked.migrate_incoming("tcp:127.0.0.1:0")


BROKEN = {"migfw-ram": "ram", "third-party": "third"}
"""Distribution -> its plugin."""


@pytest.mark.parametrize("distribution", BROKEN)
def test_a_plugin_that_fails_to_load_is_a_blocker_that_names_it(
    distribution: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = BROKEN[distribution]
    module = f"{name}_that_breaks"
    site = install(
        tmp_path / "site", distribution, plugins={name: module}, modules={module: "raise ImportError('no libfoo')"}
    )
    monkeypatch.syspath_prepend(str(site))
    plugins = Plugins.load()
    with Pair(plugins) as pair:
        source = pair.source()
        complaint = rf"plugin '{name}' \({module}\) failed to load: ImportError: no libfoo"
        source.set_capabilities({"return-path": False})
        with pytest.raises(BlockedError, match=complaint):
            source.migrate(f"file:{tmp_path}/guest")
        assert any(f"plugin '{name}' ({module})" in one for one in query_migrate(source)["blocked-reasons"])
        settings = plugins.settings()
        settings.set_property("only-migratable", True)
        machine = CountingMachine()
        with pytest.raises(UsageError, match=complaint):
            Engine(machine, plugins, settings)
        machine.close()
        runs_on(source)


class Whole(Section):
    """Claims to carry all of the guest."""

    idstr = "whole"

    def covers(self) -> Coverage:
        return Coverage(frozenset({"counters"}), frozenset({SectionKey("counter", 0)}))


class IdleSaver(Whole, Saver):
    def active(self) -> bool:
        return False


class OptionalLoader(Whole, Loader):
    """Accepts a stream without its section."""

    def required(self) -> bool:
        return False


class Only:
    """A plugin with one section."""

    @hookimpl
    def corefw_section_savers(self) -> list[SectionSaver]:
        return [IdleSaver()]

    @hookimpl
    def corefw_section_loaders(self) -> list[SectionLoader]:
        return [OptionalLoader()]


def plugins_with_one_section() -> Plugins:
    plugins = Plugins()
    plugins.register(Only(), "only")
    return plugins


def test_a_saver_that_has_nothing_to_send_carries_nothing(tmp_path: Path) -> None:
    with Pair(plugins_with_one_section()) as pair:
        source = pair.source()
        source.set_capabilities({"return-path": False})
        source.migrate(f"file:{tmp_path}/guest")
        assert ended(source) == "failed"
        assert "no plugin carries RAM block 'counters'" in query_migrate(source)["error-desc"]
        assert not (tmp_path / "guest").exists()
        runs_on(source)


def test_a_stream_that_did_not_bring_the_ram_is_not_started(tmp_path: Path) -> None:
    sink = MemorySink()
    writer = StreamWriter(sink)
    write_header(writer)
    write_configuration(writer, Configuration("counting", b""))
    writer.u8(SectionType.EOF)
    writer.flush()
    (tmp_path / "guest").write_bytes(bytes(sink.data))
    with Pair(plugins_with_one_section()) as pair:
        destination = pair.destination()
        destination.migrate_incoming(f"file:{tmp_path}/guest")
        assert arrived(destination) == "failed"
        assert "expected RAM block 'counters'" in query_migrate(destination)["error-desc"]
        assert destination.machine.run_state == "inmigrate"


def test_a_ram_section_without_its_block_list_is_no_ram(pair: Pair, tmp_path: Path) -> None:
    source, destination = pair.source(), pair.destination()
    source.set_capabilities({"return-path": False})
    source.migrate(f"file:{tmp_path}/guest")
    assert ended(source) == "completed"
    data = (tmp_path / "guest").read_bytes()
    # section START, id 0, "ram", instance 0, version 4; then the list: total, and (name, length) of the one block
    head = b"\3ram" + (0).to_bytes(4, "big") + (4).to_bytes(4, "big")
    at = data.index(head) + len(head)
    listed = 8 + 1 + len("counters") + 8
    (tmp_path / "cut").write_bytes(data[:at] + data[at + listed :])
    destination.migrate_incoming(f"file:{tmp_path}/cut")
    assert arrived(destination) == "failed"
    assert "expected RAM block 'counters'" in query_migrate(destination)["error-desc"]
