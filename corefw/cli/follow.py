"""Watches a migration until it is over.

It only asks and shows. What it may do on the way (cancel at Ctrl-C, switch to postcopy, say what to do in
pre-switchover) it does once each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from corefw.cli.engines import POLL, EngineClient
from corefw.cli.interrupts import Interrupts
from corefw.cli.progress import Display, Progress
from corefw.errors import ChannelError, MigfwError
from corefw.states import MigrationStatus

OVER: Final = frozenset(
    {
        MigrationStatus.NONE,
        MigrationStatus.COMPLETED,
        MigrationStatus.FAILED,
        MigrationStatus.CANCELLED,
        MigrationStatus.POSTCOPY_PAUSED,
        MigrationStatus.COLO,
    }
)
"""Nothing more happens by itself."""

_FIRST_PASS: Final = 2
"""When the second pass begins (dirty-sync-count), everything was sent once: the time to switch to postcopy."""


class Follower:
    """One migration of one engine, shown on one display.

    hopeless   asked at every look; the migration is cancelled once it says True (a relay that failed)
    """

    def __init__(
        self,
        engine: EngineClient,
        display: Display,
        interrupts: Interrupts | None = None,
        *,
        postcopy: bool = False,
        hopeless: Callable[[], bool] | None = None,
    ) -> None:
        self._engine = engine
        self._display = display
        self._interrupts = interrupts or Interrupts()
        self._postcopy = postcopy
        self._hopeless = hopeless
        self._cancelling = False
        self._explained = False

    def wait(self) -> dict[str, Any]:
        """Until it is over; the last answer of query-migrate. Raises MigfwError when the engine went away."""
        while True:
            try:
                answer = self._engine.query_migrate()
            except ChannelError as error:
                raise MigfwError(
                    f"the engine ended while its guest migrated ({error}): check the destination"
                ) from None
            progress = Progress.of(answer)
            if progress.phase in OVER:
                return answer
            self._display.update(progress)
            self._act(progress)
            time.sleep(POLL)

    def _act(self, progress: Progress) -> None:
        hopeless = self._hopeless is not None and self._hopeless()
        if not self._cancelling and (self._interrupts.requested or hopeless):
            self._cancelling = True
            if self._interrupts.requested:
                self._display.say("cancelling; press Ctrl-C again to exit at once")
            self._engine.call("migrate_cancel")
        elif self._postcopy and progress.passes >= _FIRST_PASS:
            self._postcopy = False
            self._engine.call("migrate-start-postcopy")
        if progress.phase == MigrationStatus.PRE_SWITCHOVER and not self._explained:
            self._explained = True
            self._display.say("the guest is stopped before the switchover: 'migfw continue' or 'migfw cancel'")
