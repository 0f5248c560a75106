"""QMP's answers and events, made from the engine's reports; documents.py has their types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from corefw.control import (
    AllocationReport,
    BlocktimeReport,
    CheckReport,
    MigrationReport,
    PassBegan,
    PostcopySwitch,
    ReconnectReport,
    RunStateChanged,
    TransferReport,
)
from corefw.dispatch import Event
from corefw.machine import RunState
from corefw.qmp.documents import MigrationInfo, MigrationStats, StatusInfo
from corefw.states import SENDING, MigrationStatus, StatusChanged

if TYPE_CHECKING:
    from corefw.engine import Launch


def event_document(event: Event) -> tuple[str, dict[str, object]] | None:
    """Name and data of the QMP event for something that happened; None where QMP has no event for it."""
    match event:
        case StatusChanged():
            return "MIGRATION", {"status": str(event.new)}
        case PassBegan():
            return "MIGRATION_PASS", {"pass": event.number}
        case RunStateChanged(new=RunState.RUNNING):
            return "RESUME", {}
        case RunStateChanged(new=RunState.SHUTDOWN):
            return "SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}
        case RunStateChanged(new=RunState.INTERNAL_ERROR):
            return "SHUTDOWN", {"guest": True, "reason": "host-error"}
        case RunStateChanged(old=RunState.RUNNING):
            return "STOP", {}
    return None


def status_info(state: RunState) -> StatusInfo:
    """query-status's answer."""
    return {"running": state is RunState.RUNNING, "singlestep": False, "status": str(state)}


_BROKEN: Final = frozenset({MigrationStatus.POSTCOPY_PAUSED, MigrationStatus.FAILING, MigrationStatus.FAILED})


def migration_info(report: MigrationReport) -> MigrationInfo:
    """query-migrate's answer. Which members appear in which status is QEMU 7.2's choice (fill_source_migration_info,
    fill_destination_migration_info); "x-migfw" has what QEMU's members have no place for."""
    status, transfer = report.status, report.transfer
    info: dict[str, Any] = {}
    if status is not MigrationStatus.NONE:
        info["status"] = str(status)
        if transfer is not None:
            info |= _figures(status, transfer)
            info["x-migfw"] = _own_figures(report, transfer)
        elif own := _arriving_figures(report):
            info["x-migfw"] = own
        if report.blocktime is not None and status is MigrationStatus.COMPLETED:
            info |= _blocktime(report.blocktime)
        if report.error is not None and status in _BROKEN:
            info["error-desc"] = report.error
    if report.blocked_reasons:
        info["blocked-reasons"] = list(report.blocked_reasons)
    return cast("MigrationInfo", info)


def _figures(status: MigrationStatus, transfer: TransferReport) -> dict[str, Any]:
    if status in SENDING:
        return {
            "total-time": transfer.total_time,
            "expected-downtime": transfer.expected_downtime,
            "setup-time": transfer.setup_time,
            "remaining": transfer.remaining,
            "ram": _ram(transfer, done=False),
        }
    if status is MigrationStatus.COMPLETED:
        return {
            "total-time": transfer.total_time,
            "downtime": transfer.downtime,
            "setup-time": transfer.setup_time,
            "ram": _ram(transfer, done=True),
        }
    return {}


def _ram(transfer: TransferReport, *, done: bool) -> MigrationStats:
    ram = transfer.ram
    return {
        "transferred": transfer.transferred,
        "total": ram.total_bytes,
        "remaining": 0 if done else ram.remaining_bytes,
        "duplicate": ram.duplicate,
        "skipped": 0,
        "normal": ram.normal,
        "normal-bytes": ram.normal * ram.page_size,
        "dirty-pages-rate": 0 if done else ram.dirty_pages_rate,
        "mbps": transfer.mbps,
        "dirty-sync-count": ram.dirty_sync_count,
        "postcopy-requests": ram.postcopy_requests,
        "page-size": ram.page_size,
        "multifd-bytes": 0,
        "pages-per-second": transfer.pages_per_second,
        "precopy-bytes": transfer.precopy_bytes,
        "downtime-bytes": transfer.transferred - transfer.precopy_bytes - transfer.postcopy_bytes,
        "postcopy-bytes": transfer.postcopy_bytes,
        "dirty-sync-missed-zero-copy": 0,
    }


def _own_figures(report: MigrationReport, transfer: TransferReport) -> dict[str, Any]:
    """What is not known is left out."""
    status = report.status
    known = {
        "dirty-rate": transfer.dirty_rate,
        "time-left": transfer.time_left,
        "pass-time-left": transfer.pass_time_left,
        "expected-downtime": transfer.pass_downtime,
        "converges": transfer.converges,
    }
    return {
        "pass": transfer.ram.dirty_sync_count,
        "total": transfer.total,
        "remaining": transfer.remaining_now,
        "send-rate": int(transfer.send_rate),
        **{name: _plain(value) for name, value in known.items() if value is not None},
        **({"guest": transfer.guest} if status is MigrationStatus.COMPLETED else {}),
        **({"reason": report.error} if report.error is not None and status is MigrationStatus.CANCELLED else {}),
        **({"reconnect": _reconnect(transfer.reconnect)} if transfer.reconnect is not None else {}),
        **({"postcopy-switch": _switch(transfer.switch)} if transfer.switch is not None else {}),
        "warnings": list(transfer.warnings),
        "sections": {name: dict(figures) for name, figures in report.sections.items()},
    }


def _reconnect(report: ReconnectReport) -> dict[str, Any]:
    limit = {"limit": report.limit} if report.limit is not None else {}
    return {"attempts": report.attempts, "wait": report.wait, **limit}


def _switch(switch: PostcopySwitch) -> dict[str, Any]:
    return {
        "reason": switch.reason,
        "time": switch.after,
        "pass": switch.passes,
        "remaining": switch.remaining,
    }


def _blocktime(report: BlocktimeReport) -> dict[str, Any]:
    """Blocktimes in milliseconds, latencies in nanoseconds (QEMU 11.1; the latencies since 10.1). QEMU leaves them out
    until the migration has completed."""
    return {
        "postcopy-blocktime": report.blocktime // _MILLISECOND,
        "postcopy-vcpu-blocktime": [one // _MILLISECOND for one in report.blocktime_of_threads],
        "postcopy-latency": report.average,
        "postcopy-latency-dist": list(report.distribution),
        "postcopy-vcpu-latency": list(report.average_of_threads),
        "postcopy-non-vcpu-latency": report.average_of_others,
    }


def _arriving_figures(report: MigrationReport) -> dict[str, Any]:
    """What a destination reports beside QEMU's members."""
    own: dict[str, Any] = {"sections": dict(report.sections)} if report.sections else {}
    if (measured := report.blocktime) is not None:
        own["page-faults"] = {
            "count": measured.faults,
            "waiting": measured.waiting,
            "blocktime": measured.blocktime,
            "latency-average": measured.average,
            "latency-p50": measured.median,
            "latency-p99": measured.p99,
            "latency-max": measured.longest,
        }
    if report.warning:
        own["warnings"] = [report.warning]
    return own


_MILLISECOND: Final = 1_000_000
"""Nanoseconds."""


def _plain(value: float | bool) -> int | bool:
    return value if isinstance(value, bool) else int(value)


def check_document(report: CheckReport) -> dict[str, object]:
    """x-migfw-check's answer."""
    return {
        "ok": not report.problems,
        "problems": list(report.problems),
        "notes": list(report.notes),
        "ram": report.ram,
        "ram-used": report.ram_used,
        "dirty-rate": report.dirty_rate,
        "destination": dict(report.destination) if report.destination is not None else None,
        "bandwidth": report.bandwidth,
        "round-trip": report.round_trip,
        "converges": report.converges,
        "expected-time": report.expected_time,
        "expected-downtime": report.expected_downtime,
        "passes": report.passes,
    }


def preallocation_info(report: AllocationReport | None) -> dict[str, object] | None:
    """How much RAM is allocated on a destination that waits, as x-migfw-status has it."""
    if report is None:
        return None
    return {"allocated": report.allocated, "total": report.total, "running": report.running}


def launch_document(launch: Launch) -> dict[str, object]:
    """How the engine was started, as x-migfw-status has it."""
    return {
        "machine": launch.machine,
        "program": launch.program,
        "options": dict(launch.options),
        "properties": dict(launch.properties),
        "directory": launch.directory,
        "allow-undeclared": launch.allow_undeclared,
        "log": launch.log,
    }
