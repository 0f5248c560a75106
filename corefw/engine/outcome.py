"""Tells a source that missed it how its postcopy ended on the destination.

The connection may break right before SHUT 0, or before the reason why the guest could not be started. The source is
paused then, and cannot know. So a destination that has ended goes on listening unless its source has heard it, and
migrate-recover has it listen at another address: the source that comes back, and shows that it is the same one, is told
the outcome again, as often as it asks.

Threads: one that waits for the source; the methods may be called from any.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from corefw.channel import Interrupt
from corefw.engine.connection import Connection
from corefw.engine.readmission import Readmission, Relisten
from corefw.errors import ANYTHING, Interrupted
from corefw.settings import Settings

log = logging.getLogger(__name__)


REMEMBERED: Final = 3600.0
"""Seconds for which the address of a guest that has arrived is kept for its source."""


class Outcome:
    """How one incoming postcopy ended.

    problem       why the guest is not here; empty if it is
    readmission   listens until the source has heard it, but for no longer than REMEMBERED if the guest is here
    """

    def __init__(self, settings: Settings, secret: bytes, problem: str, relisten: Relisten | None) -> None:
        """`relisten` listens where the migration did; None: nowhere before migrate-recover."""
        self.problem: Final = problem
        self.readmission: Final = Readmission(settings, Interrupt(), lambda: None, lambda: None)
        self.readmission.listen_by(relisten)
        self.readmission.begin(secret, paused=True)
        self._forget = threading.Timer(REMEMBERED, self.readmission.suspend)
        self._forget.daemon = True
        if not problem:
            self._forget.start()
        self._thread = threading.Thread(target=self._run, name="outcome", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection = self.readmission.await_source()
            except Interrupted:
                return
            try:
                if self._tell(connection):
                    self.readmission.suspend()
            except ANYTHING as error:  # the next source that comes is to hear it all the same
                log.warning("could not tell the source how its migration ended: %s", error)
            finally:
                connection.close()

    def _tell(self, connection: Connection) -> bool:
        connection.open_return_path()
        return connection.report_failure(self.problem) if self.problem else connection.report_success()

    def close(self) -> None:
        """Tell nobody any more. Idempotent; does not raise."""
        self._forget.cancel()
        self.readmission.close()
        self._thread.join()
