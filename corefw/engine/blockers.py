"""What keeps a guest from migrating: reasons added by hand, broken plugins, plugins' hooks, devices, and parts of the
machine that no section carries.

A migration is refused for all reasons at once. No reason can be added while a migration runs, and none at all under
only-migratable. Source: QEMU's migrate_add_blocker and migration_is_blocked (7.2). Thread-safe.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from corefw.engine.coverage import uncovered
from corefw.errors import ANYTHING, FOREIGN, MigfwError, StateError, UsageError
from corefw.machine import Machine
from corefw.plugins import Plugins
from corefw.registry import SaverRegistry
from corefw.settings import Settings

log = logging.getLogger(__name__)

PATIENCE: Final = 0.04
"""Seconds that recent() waits for an answer of this moment before it gives the last one."""


class Blockers:
    """The reasons of one engine.

    `make_savers` gives new savers for one migration; it may raise PluginError.
    """

    def __init__(
        self, machine: Machine, plugins: Plugins, settings: Settings, make_savers: Callable[[], SaverRegistry]
    ) -> None:
        self._machine = machine
        self._plugins = plugins
        self._settings = settings
        self._make_savers = make_savers
        self._lock = threading.Lock()
        self._added: list[str] = []
        self._last: list[str] | None = None
        self._asking: Future[list[str]] | None = None

    def add(self, reason: str, *, migrating: bool) -> None:
        """Raises StateError while a migration runs, UsageError under only-migratable."""
        if self._settings.property("only-migratable"):
            raise UsageError(f"disallowing migration blocker (only-migratable) for: {reason}")
        if migrating:
            raise StateError(f"disallowing migration blocker (migration in progress) for: {reason}")
        with self._lock:
            self._added.append(reason)

    def remove(self, reason: str) -> None:
        """Does nothing if the reason is not there."""
        with self._lock:
            if reason in self._added:
                self._added.remove(reason)

    @property
    def added(self) -> list[str]:
        """The reasons that were added by hand."""
        with self._lock:
            return list(self._added)

    def found(self, savers: SaverRegistry) -> list[str]:
        """Every other reason there is at this moment. It may take a second: plugins ask the guest."""
        reasons = self._plugins.blockers(self._machine, self._settings)
        reasons += self._uncovered(savers)
        reasons += [reason for saver in savers.state() if (reason := saver.blocked())]
        return reasons

    def recent(self) -> list[str]:
        """Every reason, to be shown: of this moment if they are known within PATIENCE, else those of the last time.
        Only the first call waits for as long as it takes."""
        with self._lock:
            mine = Future[list[str]]() if self._asking is None else None
            asking = self._asking = mine or self._asking
        if mine is not None:
            try:
                threading.Thread(target=self._ask, args=(mine,), name="blockers", daemon=True).start()
            except RuntimeError:  # the host gives us no thread
                self._ask(mine)
        assert asking is not None
        try:
            found = asking.result(None if self._last is None else PATIENCE)
        except TimeoutError:
            found = self._last or []
        return self.added + found

    def _ask(self, asking: Future[list[str]]) -> None:
        try:
            found = self.found(self._make_savers())
        except MigfwError as error:  # `migrate` would raise it: that is in the way too
            found = [str(error)]
        except ANYTHING as error:
            self._asking = None
            asking.set_exception(error)
            return
        self._last, self._asking = found, None
        asking.set_result(found)

    def _uncovered(self, savers: SaverRegistry) -> list[str]:
        try:
            return uncovered(self._machine, savers)
        except MigfwError as error:
            return [str(error)]
        except FOREIGN:  # a migration asks again before it sends anything, and fails with this
            log.debug("the machine does not say what it consists of", exc_info=True)
            return []
