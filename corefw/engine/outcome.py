"""Tells a source that missed it how its postcopy ended on the destination.

The connection may break right before SHUT 0, or before the reason why the guest could not be started. The source is
paused then, and cannot know. So migrate-recover works on a destination that has ended, too: the source that comes back,
and shows that it is the same one, is told the outcome again, as often as it asks.

Threads: one that waits for the source; the methods may be called from any.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from corefw.channel import Interrupt
from corefw.engine.connection import Connection
from corefw.engine.readmission import Readmission
from corefw.errors import ChannelError, Interrupted
from corefw.settings import Settings

log = logging.getLogger(__name__)


class Outcome:
    """How one incoming postcopy ended. `readmission` listens where migrate-recover says, and nowhere before.

    problem   why the guest is not here; empty if it is
    """

    def __init__(self, settings: Settings, secret: bytes, problem: str) -> None:
        self.problem: Final = problem
        self.readmission: Final = Readmission(settings, Interrupt(), lambda channel: False, lambda: None)
        self.readmission.suspend()
        self.readmission.begin(secret, paused=True)
        self._thread = threading.Thread(target=self._run, name="outcome", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection = self.readmission.await_source()
            except Interrupted:
                return
            try:
                self._tell(connection)
            except ChannelError as error:
                log.warning("could not tell the source how its migration ended: %s", error)
            finally:
                connection.close()

    def _tell(self, connection: Connection) -> None:
        connection.open_return_path()
        if self.problem:
            connection.report_failure(self.problem)
        else:
            connection.report_success()

    def close(self) -> None:
        """Tell nobody any more. Idempotent; does not raise."""
        self.readmission.close()
        self._thread.join()
