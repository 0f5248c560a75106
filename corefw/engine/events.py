"""The engine's events, which are QMP's, and their observers.

Events are delivered in order, by a thread that caused one, with no lock held. An observer that fails does not keep the
others from hearing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corefw.errors import FOREIGN
from corefw.news import News

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """A QMP event: its name, its data, and when it happened (time.time())."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    timestamp: float = field(default_factory=time.time)


Observer = Callable[[Event], None]


class Events:
    """The events of one engine. Thread-safe."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []
        self._news = News(self._tell_all)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call `observer(event)` for every event from now on; returns what ends that."""
        self._observers.append(observer)
        return lambda: self._observers.remove(observer) if observer in self._observers else None

    def post(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """It has happened; tell() makes it known."""
        self._news.post(Event(name, data or {}))

    def tell(self) -> None:
        """To be called without locks."""
        self._news.tell()

    def _tell_all(self, event: Event) -> None:
        for observer in list(self._observers):
            try:
                observer(event)
            except FOREIGN:
                log.exception("an observer of event %s failed", event.name)
