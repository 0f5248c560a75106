"""Every QMP document is made from what the engine reports, and has what QEMU's would have in that status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from corefw.control import MigrationReport, PassBegan, RunStateChanged, TransferReport
from corefw.dispatch import Event
from corefw.machine import RunState
from corefw.qmp.answers import event_document, migration_info
from corefw.qmp.commands.context import Context
from corefw.qmp.commands.monitor import human_monitor_command
from corefw.qmp.documents import EVENTS
from corefw.section import RamStatistics
from corefw.states import MigrationStatus, Side, StatusChanged

if TYPE_CHECKING:
    from corefw.engine import Engine

_S = MigrationStatus
TRANSFER = TransferReport(
    total_time=1000,
    setup_time=10,
    downtime=0,
    expected_downtime=300,
    transferred=90 << 20,
    precopy_bytes=60 << 20,
    postcopy_bytes=20 << 20,
    mbps=800.0,
    pages_per_second=25_000,
    ram=RamStatistics(
        total_bytes=128 << 20, remaining_bytes=1 << 20, normal=5, dirty_sync_count=3, postcopy_requests=7
    ),
    total=128 << 20,
    remaining=2 << 20,
    remaining_now=1 << 20,
    send_rate=100.5,
    dirty_rate=None,
    time_left=12.75,
    pass_time_left=None,
    pass_downtime=None,
    converges=False,
    guest="",
    warnings=("it is slow",),
)
SECTIONS = {"ram": {"total": 1, "remaining": 0, "sent": 1}}


def report(status: MigrationStatus, **changes: object) -> MigrationReport:
    found = MigrationReport(Side.SOURCE, status, sections=SECTIONS, transfer=TRANSFER)
    return replace(found, **changes)  # type: ignore[arg-type]


BEGUN = frozenset({"status", "x-migfw"})
SENDING = BEGUN | {"total-time", "expected-downtime", "setup-time", "remaining", "ram"}
MEMBERS: Mapping[MigrationStatus, frozenset[str]] = {
    _S.NONE: frozenset(),
    **dict.fromkeys((_S.SETUP, _S.CANCELLED), BEGUN),
    **dict.fromkeys((_S.FAILING, _S.FAILED), BEGUN | {"error-desc"}),
    **dict.fromkeys((_S.ACTIVE, _S.PRE_SWITCHOVER, _S.DEVICE, _S.CANCELLING), SENDING),
    **dict.fromkeys((_S.POSTCOPY_ACTIVE, _S.POSTCOPY_RECOVER), SENDING),
    _S.POSTCOPY_PAUSED: SENDING | {"error-desc"},
    _S.COMPLETED: BEGUN | {"total-time", "downtime", "setup-time", "ram"},
}


@pytest.mark.parametrize("status", MEMBERS)
def test_a_status_has_qemus_members(status: MigrationStatus) -> None:
    assert migration_info(report(status, error="the link broke")).keys() == MEMBERS[status]


def test_what_is_not_known_is_left_out() -> None:
    assert migration_info(report(_S.ACTIVE))["x-migfw"] == {
        "pass": 3,
        "total": 128 << 20,
        "remaining": 1 << 20,
        "send-rate": 100,
        "time-left": 12,
        "converges": False,
        "warnings": ["it is slow"],
        "sections": SECTIONS,
    }


def test_bytes_are_told_apart_by_when_they_were_sent() -> None:
    ram = migration_info(report(_S.COMPLETED))["ram"]
    assert (ram["precopy-bytes"], ram["downtime-bytes"], ram["postcopy-bytes"]) == (60 << 20, 10 << 20, 20 << 20)
    assert ram["remaining"] == 0, "whatever the last harvest left"
    assert migration_info(report(_S.POSTCOPY_ACTIVE))["ram"]["remaining"] == 1 << 20


def test_how_it_ended() -> None:
    assert migration_info(report(_S.FAILED, error="the link broke"))["error-desc"] == "the link broke"
    assert migration_info(report(_S.CANCELLED, error="took too long"))["x-migfw"]["reason"] == "took too long"
    moved = report(_S.COMPLETED, transfer=replace(TRANSFER, guest="moved"))
    assert migration_info(moved)["x-migfw"]["guest"] == "moved"


def test_a_destination() -> None:
    arrived = MigrationReport(Side.DESTINATION, _S.COMPLETED)
    assert migration_info(arrived) == {"status": "completed"}
    failed = MigrationReport(Side.DESTINATION, _S.FAILED, "no such section", sections={"own": {"rows": 3}})
    assert migration_info(failed) == {
        "status": "failed",
        "error-desc": "no such section",
        "x-migfw": {"sections": {"own": {"rows": 3}}},
    }
    blocked = MigrationReport(Side.DESTINATION, _S.NONE, blocked_reasons=("attached to a GPU",))
    assert migration_info(blocked) == {"blocked-reasons": ["attached to a GPU"]}


def test_the_human_monitor_shows_postcopy() -> None:
    class Reporting:
        def report(self) -> MigrationReport:
            return report(_S.POSTCOPY_ACTIVE)

    context = Context(cast("Engine", Reporting()), {}, lambda _: None, lambda: None, lambda: None)
    shown = human_monitor_command(context, "info migrate").splitlines()
    assert {"Migration status: postcopy-active", "postcopy ram: 20480 kbytes", "postcopy request count: 7"} <= set(
        shown
    )


R = RunState


@pytest.mark.parametrize(
    ("event", "document"),
    [
        (StatusChanged(Side.DESTINATION, _S.NONE, _S.SETUP), ("MIGRATION", {"status": "setup"})),
        (PassBegan(2), ("MIGRATION_PASS", {"pass": 2})),
        (RunStateChanged(R.PRELAUNCH, R.RUNNING), ("RESUME", {})),
        (RunStateChanged(R.RUNNING, R.PAUSED), ("STOP", {})),
        (RunStateChanged(R.RUNNING, R.FINISH_MIGRATE), ("STOP", {})),
        (RunStateChanged(R.FINISH_MIGRATE, R.POSTMIGRATE), None),
        (RunStateChanged(R.RUNNING, R.SHUTDOWN), ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})),
        (RunStateChanged(R.PAUSED, R.INTERNAL_ERROR), ("SHUTDOWN", {"guest": True, "reason": "host-error"})),
    ],
)
def test_events(event: Event, document: tuple[str, dict[str, object]] | None) -> None:
    assert event_document(event) == document
    assert document is None or document[0] in EVENTS
