"""The figures of a migration and the document that query-migrate answers with.

The law: the migration thread writes, anybody reads; times are milliseconds. Field names and which of them appear in
which status are QEMU 7.2's MigrationInfo (fill_source_migration_info, fill_destination_migration_info).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from corefw.engine.convergence import Convergence
from corefw.section import RamStatistics
from corefw.states import MigrationStatus

_RUNNING: Final = frozenset(
    {
        MigrationStatus.ACTIVE,
        MigrationStatus.CANCELLING,
        MigrationStatus.POSTCOPY_ACTIVE,
        MigrationStatus.POSTCOPY_PAUSED,
        MigrationStatus.POSTCOPY_RECOVER,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
    }
)


@dataclass(slots=True)
class OutgoingStatistics:
    """One migration's figures on the source."""

    started: float = field(default_factory=time.monotonic)
    setup_time: int = 0
    total_time: int = 0
    downtime: int = 0
    expected_downtime: int = 0
    mbps: float = 0.0
    pages_per_second: int = 0
    transferred: int = 0
    precopy_bytes: int = 0
    ram: RamStatistics = field(default_factory=RamStatistics)
    error: str | None = None

    def elapsed(self) -> int:
        return milliseconds_since(self.started)

    def update(self, convergence: Convergence) -> None:
        """After each PART."""
        self.transferred = self.precopy_bytes = convergence.position
        self.mbps = convergence.bandwidth * 8 / 1e6
        self.pages_per_second = int(convergence.bandwidth / self.ram.page_size)
        self.expected_downtime = convergence.expected_downtime

    def finish(self, downtime: int) -> None:
        """The guest has left (migration_calculate_complete)."""
        self.total_time = self.elapsed()
        self.downtime = downtime
        self.mbps = self.transferred * 8 / max(1, self.total_time) / 1000
        self.ram.remaining_bytes = 0

    def fail(self, reason: str) -> None:
        self.total_time = self.elapsed()
        self.error = reason

    def document(self, status: MigrationStatus) -> dict[str, Any]:
        """query-migrate's answer."""
        info: dict[str, Any] = {"status": str(status)}
        if status in _RUNNING:
            info |= {
                "total-time": self.elapsed(),
                "expected-downtime": self.expected_downtime,
                "setup-time": self.setup_time,
                "ram": self._ram(status),
            }
        elif status is MigrationStatus.COMPLETED:
            info |= {
                "total-time": self.total_time,
                "downtime": self.downtime,
                "setup-time": self.setup_time,
                "ram": self._ram(status),
            }
        if self.error is not None and status in (MigrationStatus.FAILED, MigrationStatus.CANCELLED):
            info["error-desc"] = self.error
        return info

    def _ram(self, status: MigrationStatus) -> dict[str, Any]:
        ram = self.ram
        done = status is MigrationStatus.COMPLETED
        return {
            "transferred": self.transferred,
            "total": ram.total_bytes,
            "remaining": 0 if done else ram.remaining_bytes,
            "duplicate": ram.duplicate,
            "skipped": 0,
            "normal": ram.normal,
            "normal-bytes": ram.normal * ram.page_size,
            "dirty-pages-rate": 0 if done else ram.dirty_pages_rate,
            "mbps": self.mbps,
            "dirty-sync-count": ram.dirty_sync_count,
            "postcopy-requests": ram.postcopy_requests,
            "page-size": ram.page_size,
            "multifd-bytes": 0,
            "pages-per-second": self.pages_per_second,
            "precopy-bytes": self.precopy_bytes,
            "downtime-bytes": self.transferred - self.precopy_bytes,
            "postcopy-bytes": 0,
            "dirty-sync-missed-zero-copy": 0,
        }


def idle_document(status: MigrationStatus, error: str | None) -> dict[str, Any]:
    """query-migrate on a destination, or where no migration has happened."""
    if status is MigrationStatus.NONE:
        return {}
    info: dict[str, Any] = {"status": str(status)}
    if error is not None and status is MigrationStatus.FAILED:
        info["error-desc"] = error
    return info


def with_blockers(info: dict[str, Any], reasons: Sequence[str]) -> dict[str, Any]:
    return info | {"blocked-reasons": list(reasons)} if reasons else info


def milliseconds_since(moment: float) -> int:
    """From a time.monotonic() moment."""
    return int((time.monotonic() - moment) * 1000)
