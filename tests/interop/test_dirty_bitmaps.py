"""Dirty bitmaps go with a machine from one QEMU through migfw into another, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from corefw.machine import BlockMachine
from corefw.states import MigrationStatus
from tests.helpers.parking import PATIENCE, park, parking, send, wait_parked
from tests.helpers.qemu import Qemu, needs_qemu

pytestmark = [pytest.mark.qemu, needs_qemu, pytest.mark.timeout(240)]

DISKS: Final = (
    *("-blockdev", "driver=null-co,node-name=disk,size=100000000,read-zeroes=on"),
    *("-drive", "if=none,id=drive,driver=null-co,size=1048576,read-zeroes=on"),
)
BITMAPS: Final[tuple[dict[str, Any], ...]] = (
    {"node": "disk", "name": "coarse"},
    {"node": "disk", "name": "fine", "granularity": 512},
    {"node": "disk", "name": "off", "granularity": 4096, "disabled": True},
    {"node": "drive", "name": "coarse", "granularity": 8192},
)
WRITES: Final = (
    *('disk "write 1M 128k"', 'disk "write 70000k 3M"', 'disk "write 99999744 256"'),
    *('drive "write 512 512"', 'drive "write 1040384 8192"'),
)


def with_bitmaps(source: Qemu) -> list[str]:
    """Make the bitmaps, write, and return their digests."""
    for bitmap in BITMAPS:
        source.command("block-dirty-bitmap-add", **bitmap)
    for write in WRITES:
        source.command("human-monitor-command", command_line=f"qemu-io {write}")
    return digests(source)


def digests(qemu: Qemu) -> list[str]:
    return [
        qemu.command("x-debug-block-dirty-bitmap-sha256", node=one["node"], name=one["name"])["sha256"]
        for one in BITMAPS
    ]


def digests_here(machine: object) -> list[str]:
    assert isinstance(machine, BlockMachine)
    found = []
    for one in BITMAPS:
        node = machine.find_node(one["node"])
        assert node is not None
        found.append(node.bitmap(one["name"]).sha256())
    return found


def recording(qemu: Qemu) -> dict[tuple[str, str], bool]:
    """For each bitmap, whether it records writes; QEMU 5.2 says that in words too."""
    return {
        (node["node-name"], one["name"]): bool(one["recording"])
        for node in qemu.command("query-named-block-nodes")
        for one in node.get("dirty-bitmaps", ())
    }


@pytest.mark.usefixtures("every_qemu")
def test_bitmaps_are_parked_and_arrive_in_precopy(folder: Path) -> None:
    """Over tcp, through a file, and over tcp again."""
    with (
        Qemu(*DISKS, paused=True) as source,
        parking("dirty-bitmaps") as engine,
        parking("dirty-bitmaps") as other,
        Qemu(*DISKS, incoming="defer") as destination,
    ):
        source.capabilities("dirty-bitmaps")
        expected = with_bitmaps(source)
        assert len(set(expected)) == len(expected)
        park(source, engine, "tcp:127.0.0.1:0")
        assert digests_here(engine.machine) == expected
        send(engine, f"file:{folder}/stored")
        other.migrate_incoming(f"file:{folder}/stored")
        wait_parked(other)
        send(other, destination.listen())
        assert digests(destination) == expected
        records = recording(destination)
        assert (records["disk", "fine"], records["disk", "off"]) == (True, False)


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize("ram", [True, False], ids=["with postcopy-ram", "alone"])
def test_bitmaps_follow_the_guest_in_postcopy(ram: bool) -> None:
    """Both ways. The bits are more than what the limit lets through before the machine has gone."""
    capabilities = ["dirty-bitmaps", *(["postcopy-ram"] if ram else [])]
    with (
        Qemu(*DISKS, paused=True) as source,
        parking(*capabilities) as engine,
        Qemu(*DISKS, incoming="defer") as destination,
    ):
        for qemu in (source, destination):
            qemu.capabilities("events", *capabilities)
        source.command("human-monitor-command", command_line='qemu-io disk "write 0 90M"')
        expected = with_bitmaps(source)
        source.command("migrate-set-parameters", max_bandwidth=1 << 30)
        source.command("migrate", uri=engine.migrate_incoming("tcp:127.0.0.1:0"))
        source.command("migrate-start-postcopy")
        wait_parked(engine)
        source.wait_migrated()
        assert "postcopy-active" in [
            event["data"]["status"] for event in source.events if event["event"] == "MIGRATION"
        ]
        assert digests_here(engine.machine) == expected
        engine.migrate(destination.listen())
        engine.start_postcopy()
        assert engine.wait_outgoing(PATIENCE) is MigrationStatus.COMPLETED, destination.output()
        assert digests(destination) == expected
