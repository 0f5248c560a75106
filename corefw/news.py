"""News for observers: told in order, one piece at a time, and with no lock held.

The law: what was posted first is told first, and everybody has heard of it before anybody hears of the next, also where
hearing it leads to more news. One thread tells at a time; who posts while another tells leaves it to that one and goes
on. So an observer may call whatever it likes, and nobody waits for an observer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class News(Generic[_T]):
    """`post` may be called under any lock, `tell` has to be called after that was let go. Thread-safe."""

    def __init__(self, tell: Callable[[_T], None]) -> None:
        """`tell` is given one piece of news at a time; it does not raise."""
        self._tell = tell
        self._lock = threading.Lock()
        self._waiting: deque[_T] = deque()
        self._telling = False

    def post(self, piece: _T) -> None:
        """To be told by the next tell()."""
        self._waiting.append(piece)

    def tell(self) -> None:
        """Tell everything that was posted, unless somebody is at it already: then he tells this as well."""
        while self._begin():
            try:
                while self._waiting:
                    self._tell(self._waiting.popleft())
            finally:
                self._telling = False

    def _begin(self) -> bool:
        with self._lock:
            if self._telling or not self._waiting:
                return False
            self._telling = True
            return True
