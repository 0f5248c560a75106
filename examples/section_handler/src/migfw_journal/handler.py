"""The handler of section 'journal': what the engine calls, and when.

Invariant: a handler serves one migration in one direction. What it loads becomes the guest's journal only when the
whole of it was loaded, so that a migration that fails leaves no half of a journal behind.
"""

from __future__ import annotations

from typing import Any, Final

from corefw.section import IncomingContext, Priority, StateHandler
from corefw.settings import Settings
from corefw.wire.stream import StreamReader, StreamWriter
from migfw_journal.journal import JOURNAL, Journal

CAPABILITY: Final = "x-journal"


class JournalHandler(StateHandler):
    """A StateHandler: the section is sent whole, when the guest has stopped.

    The journal belongs to this plugin and not to the machine, so the handler covers no RAM block or device of the
    machine's: it leaves covers() as it is.
    """

    idstr = "journal"
    version_id = JOURNAL.version_id
    minimum_version = JOURNAL.oldest
    priority = Priority.LATE

    def __init__(self, journal: Journal, settings: Settings) -> None:
        self._journal = journal
        self._settings = settings
        self._described: dict[str, Any] = {}

    # -- on the source ---------------------------------------------------------------------------------------------

    def blocked(self) -> str | None:
        """Nothing about a journal keeps a guest from migrating."""
        return None

    def needed(self) -> bool:
        return self._settings.capability(CAPABILITY)

    def save(self, writer: StreamWriter) -> None:
        self._described = JOURNAL.save(writer, self._journal)

    def describe(self) -> dict[str, Any]:
        return self._described

    # -- on the destination ----------------------------------------------------------------------------------------

    def required(self) -> bool:
        """A source that keeps no journal is welcome."""
        return False

    def load_setup(self, context: IncomingContext) -> None:
        """Nothing to prepare."""

    def load(self, reader: StreamReader, version_id: int) -> None:
        arriving = Journal()
        JOURNAL.load(reader, arriving, version_id)
        arriving.arrive()
        self._journal.hops = arriving.hops

    def load_cleanup(self) -> None:
        """Nothing to clean up."""
