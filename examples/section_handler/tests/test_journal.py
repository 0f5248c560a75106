"""The journal plugin: the contract kit, and what is particular to it."""

from __future__ import annotations

import socket

import migfw_journal
import pytest
from migfw_journal.handler import JournalHandler
from migfw_journal.journal import MOST_HOPS, Hop, Journal

from corefw.errors import RemoteStreamError
from corefw.plugins import Plugins
from corefw.settings import Settings
from corefw.testing.handler import CHECKS, HandlerCase, check_handler
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter

FOOTER = b"\x7e\0\0\0\7\0"
HERE = socket.gethostname()


@pytest.fixture
def settings() -> Settings:
    """With the plugin's capability, switched on."""
    return enabled()


def enabled() -> Settings:
    settings = Settings([migfw_journal.corefw_settings()])
    settings.set_capabilities({"x-journal": True})
    return settings


def travelled() -> Journal:
    return Journal([Hop(b"red", 1_700_000_000), Hop("gr\u00fcn".encode(), 1_700_000_060)])


def body_of(handler: JournalHandler) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    handler.save(writer)
    writer.flush()
    return bytes(sink.data)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: str) -> None:
    """The whole of what migfw promises itself of a handler. The journal that arrives has one entry more than was sent:
    `state` looks at the others."""
    sent = len(travelled().hops)
    case = HandlerCase(
        source=lambda: JournalHandler(travelled(), enabled()),
        destination=lambda: JournalHandler(Journal(), enabled()),
        state=lambda handler: [(hop.host, hop.since) for hop in handler._journal.hops[:sent]],
    )
    assert check_handler(case, only=[check]) == [check]


def test_bytes(settings: Settings) -> None:
    body = body_of(JournalHandler(Journal([Hop(b"red", 5)]), settings))
    assert body == b"\0\1" + b"\3red" + b"\0\0\0\0\0\0\0\5"


def test_arrival_is_entered(settings: Settings) -> None:
    body = body_of(JournalHandler(travelled(), settings))
    here = Journal()
    JournalHandler(here, settings).load(StreamReader(MemorySource(body + FOOTER)), 1)
    assert [hop.host for hop in here.hops] == ["red", "gr\u00fcn", HERE]


def test_journal_that_fails_to_load_leaves_the_old_one(settings: Settings) -> None:
    here = Journal([Hop(b"blue", 7)])
    with pytest.raises(RemoteStreamError, match="expected a host's name as text"):
        JournalHandler(here, settings).load(StreamReader(MemorySource(b"\0\1\1\xff" + bytes(8) + FOOTER)), 1)
    assert [hop.host for hop in here.hops] == ["blue"]


def test_number_of_hops_is_bounded(settings: Settings) -> None:
    with pytest.raises(RemoteStreamError, match=f"a length from 0 to {MOST_HOPS}"):
        JournalHandler(Journal(), settings).load(StreamReader(MemorySource(b"\xff\xff" + FOOTER)), 1)
    long = Journal([Hop(b"red", n) for n in range(MOST_HOPS)])
    long.arrive()
    assert (len(long.hops), long.hops[0].since, long.hops[-1].host) == (MOST_HOPS, 1, HERE)


def test_only_sent_when_asked_for() -> None:
    settings = Settings([migfw_journal.corefw_settings()])
    handler = JournalHandler(travelled(), settings)
    assert not handler.needed()
    settings.set_capabilities({"x-journal": True})
    assert handler.needed()
    assert not handler.required()


def test_registers_as_a_plugin() -> None:
    plugins = Plugins()
    plugins.register(migfw_journal, "journal")
    assert plugins.settings().implemented("x-journal")
