"""The saver and the loader of section 'journal': what the engine calls, and when.

Each serves one migration. What is loaded becomes the guest's journal only in committed(), when the guest lives here: a
migration that fails leaves no trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from corefw.section import IncomingContext, Priority, StateLoader, StateSaver
from corefw.settings import Settings
from corefw.wire.stream import StreamReader, StreamWriter
from migfw_journal.journal import JOURNAL, Journal

CAPABILITY: Final = "x-journal"


class JournalSaver(StateSaver):
    """A StateSaver: the section is sent whole, when the guest has stopped.

    The journal belongs to this plugin and not to the machine, so it covers none of the machine's RAM blocks and
    devices, and covers() is not overridden.
    """

    idstr = "journal"
    version_id = JOURNAL.version_id
    priority = Priority.LATE

    def __init__(self, journal: Journal, settings: Settings) -> None:
        self._journal = journal
        self._settings = settings
        self._described: dict[str, Any] = {}

    def blocked(self) -> str | None:
        """Return None: a journal never blocks a migration."""
        return None

    def needed(self) -> bool:
        return self._settings.capability(CAPABILITY)

    def save(self, writer: StreamWriter) -> None:
        self._described = JOURNAL.save(writer, self._journal)

    def describe(self) -> dict[str, Any]:
        return self._described

    def statistics(self) -> Mapping[str, object]:
        return {"hops": len(self._journal.hops)}


class JournalLoader(StateLoader):
    idstr = "journal"
    version_id = JOURNAL.version_id
    minimum_version = JOURNAL.oldest

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.arriving: Journal | None = None

    def required(self) -> bool:
        """Accept a source that sends no journal."""
        return False

    def setup(self, context: IncomingContext) -> None:
        """Nothing to prepare."""

    def load(self, reader: StreamReader, version_id: int) -> None:
        arriving = Journal()
        JOURNAL.load(reader, arriving, version_id)
        self.arriving = arriving

    def cleanup(self) -> None:
        """Nothing to release."""

    def committed(self) -> None:
        """Make the loaded journal the guest's, because the guest lives here now."""
        if self.arriving is not None:
            self.arriving.arrive()
            self._journal.hops = self.arriving.hops
