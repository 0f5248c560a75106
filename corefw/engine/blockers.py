"""What keeps a guest from migrating: reasons added by hand, broken plugins, plugins' hooks, devices, and parts of the
machine that no section carries.

A migration is refused for all reasons at once; a reason is refused while a migration runs, and always under
only-migratable. Source: QEMU's migrate_add_blocker and migration_is_blocked. Thread-safe.
"""

from __future__ import annotations

import logging
import threading

from corefw.engine.coverage import uncovered
from corefw.errors import FOREIGN, MigfwError, StateError, UsageError
from corefw.machine import Machine
from corefw.plugins import Plugins
from corefw.section import SaverRegistry
from corefw.settings import Settings

log = logging.getLogger(__name__)


class Blockers:
    """The reasons of one engine."""

    def __init__(self, machine: Machine, plugins: Plugins, settings: Settings) -> None:
        self._machine = machine
        self._plugins = plugins
        self._settings = settings
        self._lock = threading.Lock()
        self._reasons: list[str] = []

    def add(self, reason: str, *, migrating: bool) -> None:
        """Raises StateError while a migration runs, UsageError under only-migratable."""
        if self._settings.property("only-migratable"):
            raise UsageError(f"disallowing migration blocker (only-migratable) for: {reason}")
        if migrating:
            raise StateError(f"disallowing migration blocker (migration in progress) for: {reason}")
        with self._lock:
            self._reasons.append(reason)

    def remove(self, reason: str) -> None:
        """Nothing happens when it is not there."""
        with self._lock:
            if reason in self._reasons:
                self._reasons.remove(reason)

    def reasons(self, savers: SaverRegistry) -> list[str]:
        """Every reason there is now."""
        with self._lock:
            found = list(self._reasons)
        found += self._plugins.blockers(self._machine, self._settings)
        found += self._uncovered(savers)
        found += [reason for saver in savers.state() if (reason := saver.blocked())]
        return found

    def _uncovered(self, savers: SaverRegistry) -> list[str]:
        try:
            return uncovered(self._machine, savers)
        except MigfwError as error:
            return [str(error)]
        except FOREIGN:  # a migration asks again before it sends anything, and fails with this
            log.debug("the machine does not say what it consists of", exc_info=True)
            return []
