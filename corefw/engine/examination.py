"""Examines connections of which it is not known yet who has made them.

Each is examined in a thread of its own, so one that stays silent keeps no other waiting. Only MOST are examined at the
same time, and none for longer than PATIENCE.

Threads: every method may be called from any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from corefw.channel import Channel
from corefw.errors import FOREIGN, Interrupted, MigfwError
from corefw.settings import Settings

log = logging.getLogger(__name__)

PATIENCE: Final = 10.0
"""Seconds that a connection has to show what it is; fewer if x-migfw-incoming-timeout says so."""
MOST: Final = 16
"""Connections that are examined at the same time; the oldest makes room for one more."""


class Examination:
    """One connection that is examined. It is aborted if that takes too long, until keep().

    kept   it has an owner now, which closes it
    """

    def __init__(self, channel: Channel, patience: float) -> None:
        self.channel: Final = channel
        self.patience: Final = patience
        self.late = False
        self.kept = False
        self._lock = threading.Lock()  # guards the next
        self._decided = False
        self._timer = threading.Timer(patience, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def keep(self) -> bool:
        """It has shown what it is, and is not closed when the examination ends. False if it was aborted before."""
        self.kept = self.end()
        return self.kept

    def keep_for(self, owner: Callable[[Channel], None]) -> None:
        """keep(), and give the channel to its owner; nothing if the examination was aborted before."""
        if self.keep():
            owner(self.channel)

    def abort(self) -> None:
        """End it, unless it is kept."""
        if self.end():
            self.channel.abort()

    def end(self) -> bool:
        """It is aborted no more. False if it has been, or is kept."""
        self._timer.cancel()
        with self._lock:
            before, self._decided = self._decided, True
        return not before

    def _expire(self) -> None:
        self.late = True
        self.abort()


class Examinations:
    """All that are under way at one listener."""

    def __init__(self, settings: Settings, name: str, examine: Callable[[Examination], None]) -> None:
        """`examine` is called in a thread for each connection, which is closed when it returns, or raises MigfwError,
        then with a warning, unless it was kept."""
        self._settings = settings
        self._name = name
        self._examine = examine
        self._lock = threading.Lock()  # guards the next
        self._under_way: list[Examination] = []

    def begin(self, channel: Channel) -> None:
        """Examine this connection."""
        limit = self._settings.integer("x-migfw-incoming-timeout") / 1000
        examination = Examination(channel, min(limit or PATIENCE, PATIENCE))
        with self._lock:
            oldest = self._under_way.pop(0) if len(self._under_way) >= MOST else None
            self._under_way.append(examination)
        if oldest is not None:
            oldest.abort()
        threading.Thread(target=self._run, args=(examination,), name=self._name, daemon=True).start()

    def dismiss(self) -> None:
        """End those that are under way."""
        with self._lock:
            under_way = tuple(self._under_way)
        for one in under_way:
            one.abort()

    def _run(self, examination: Examination) -> None:
        channel = examination.channel
        problem = ""
        try:
            self._examine(examination)
        except Interrupted:
            problem = f"it did not show within {examination.patience:g} s what it is"
        except MigfwError as error:
            problem = str(error).removeprefix(f"{channel.peer}: ")
        except FOREIGN as bug:
            log.exception("a connection from %s could not be examined", channel.peer)
            problem = f"internal error: {type(bug).__name__}"
        with self._lock:
            if examination in self._under_way:
                self._under_way.remove(examination)
        unwanted = examination.end()
        if problem and (unwanted or examination.late):
            log.warning("closed a connection from %s: %s", channel.peer, problem)
        if not examination.kept:
            channel.close()
