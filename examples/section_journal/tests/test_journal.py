"""The journal plugin: the contract kit, and the plugin's own behaviour."""

from __future__ import annotations

import socket

import migfw_journal
import pytest
from migfw_journal.journal import MOST_HOPS, Hop, Journal
from migfw_journal.section import JournalLoader, JournalSaver

from corefw.errors import RemoteStreamError
from corefw.plugins import Plugins
from corefw.settings import Settings
from corefw.testing.section import CHECKS, SectionCase, check_section
from corefw.testing.settings import CHECKS as SETTINGS_CHECKS
from corefw.testing.settings import check_settings
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter

FOOTER = b"\x7e\0\0\0\7\0"
HERE = socket.gethostname()


@pytest.fixture
def settings() -> Settings:
    """Settings with the plugin's capability switched on."""
    return enabled()


def enabled() -> Settings:
    settings = Settings([migfw_journal.corefw_settings()])
    settings.set_capabilities({"x-journal": True})
    return settings


def travelled() -> Journal:
    return Journal([Hop(b"red", 1_700_000_000), Hop("gr\u00fcn".encode(), 1_700_000_060)])


def body_of(saver: JournalSaver) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    saver.save(writer)
    writer.flush()
    return bytes(sink.data)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: str) -> None:
    """Everything that migfw asks of a saver and a loader."""

    def state(section: JournalSaver | JournalLoader) -> list[tuple[str, int]]:
        journal = section.arriving if isinstance(section, JournalLoader) else travelled()
        return [(hop.host, hop.since) for hop in journal.hops] if journal is not None else []

    case = SectionCase(
        saver=lambda: JournalSaver(travelled(), enabled()), loader=lambda: JournalLoader(Journal()), state=state
    )
    assert check_section(case, only=[check]) == [check]


@pytest.mark.parametrize("check", SETTINGS_CHECKS)
def test_settings(check: str) -> None:
    assert check_settings(migfw_journal, only=[check]) == [check]


def test_bytes(settings: Settings) -> None:
    body = body_of(JournalSaver(Journal([Hop(b"red", 5)]), settings))
    assert body == b"\0\1" + b"\3red" + b"\0\0\0\0\0\0\0\5"


def test_arrival_is_entered(settings: Settings) -> None:
    body = body_of(JournalSaver(travelled(), settings))
    here = Journal()
    loader = JournalLoader(here)
    loader.load(StreamReader(MemorySource(body + FOOTER)), 1)
    assert not here.hops, "not before the guest lives here"
    loader.committed()
    assert [hop.host for hop in here.hops] == ["red", "gr\u00fcn", HERE]


def test_journal_that_fails_to_load_leaves_the_old_one() -> None:
    here = Journal([Hop(b"blue", 7)])
    with pytest.raises(RemoteStreamError, match="expected a host's name as text"):
        JournalLoader(here).load(StreamReader(MemorySource(b"\0\1\1\xff" + bytes(8) + FOOTER)), 1)
    assert [hop.host for hop in here.hops] == ["blue"]


def test_number_of_hops_is_bounded() -> None:
    with pytest.raises(RemoteStreamError, match=f"a length from 0 to {MOST_HOPS}"):
        JournalLoader(Journal()).load(StreamReader(MemorySource(b"\xff\xff" + FOOTER)), 1)
    long = Journal([Hop(b"red", n) for n in range(MOST_HOPS)])
    long.arrive()
    assert (len(long.hops), long.hops[0].since, long.hops[-1].host) == (MOST_HOPS, 1, HERE)


def test_only_sent_when_asked_for() -> None:
    settings = Settings([migfw_journal.corefw_settings()])
    saver = JournalSaver(travelled(), settings)
    assert not saver.needed()
    settings.set_capabilities({"x-journal": True})
    assert saver.needed()
    assert not JournalLoader(Journal()).required()


def test_registers_as_a_plugin() -> None:
    plugins = Plugins()
    plugins.register(migfw_journal, "journal")
    assert plugins.settings().implemented("x-journal")
