"""Decides when a migration switches to postcopy: on command, or as the parameter x-migfw-postcopy-start says.

    on-command         only migrate-start-postcopy switches
    now                before the first pass: all of the RAM follows the guest
    after-first-pass   once everything has been sent once, unless the rest fits into the downtime limit
    when-stuck         once precopy does not converge (forecast.py)

migrate-start-postcopy switches at once in each of them. Precopy that gets the rest into the downtime limit first ends
the migration without postcopy.
"""

from __future__ import annotations

import threading
from typing import Final

from corefw.engine.forecast import Outlook
from corefw.settings import Settings

FIRST: Final = 1
"""Passes that were sent when everything was sent once."""


class PostcopyStart:
    """The decision of a single migration. request() may be called from any thread, the rest by the migration thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._requested = threading.Event()
        self._reason: str | None = None

    def request(self) -> None:
        """The user wants it now (migrate-start-postcopy)."""
        self._requested.set()

    def decide(self, passes: int, outlook: Outlook) -> bool:
        """Whether to switch; once it was decided, it stays so. `passes` were sent in full."""
        if self._reason is None:
            self._reason = self._find_reason(passes, outlook)
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Why the migration switches, as a phrase; None if it does not."""
        if self._reason is None and self._requested.is_set():
            self._reason = "migrate-start-postcopy asked for it"
        return self._reason

    def _find_reason(self, passes: int, outlook: Outlook) -> str | None:
        if self._requested.is_set() or not self._settings.capability("postcopy-ram"):
            return None
        match self._settings.parameter("x-migfw-postcopy-start"):
            case "now":
                return "it was to switch at once"
            case "after-first-pass" if passes >= FIRST:
                return "everything has been sent once"
            case "when-stuck" if (problem := outlook.problem()) is not None:
                return f"precopy does not converge, because {problem}"
        return None
