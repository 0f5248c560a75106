"""Dirty bitmaps go with a machine from one QEMU through migfw into another, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from corefw.errors import SettingsError
from corefw.machine import BlockMachine
from corefw.states import MigrationStatus
from tests.helpers.parking import PATIENCE, park, parking, send, wait_parked
from tests.helpers.qemu import Qemu, QmpError, needs_qemu

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


SLOW: Final = 1 << 20
"""Bytes per second."""


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
    """Into the parked machine, and out of it. QEMU is slow at first, so that pages are left when it switches, without
    which 5.2 hangs; and the bits do not fit into its downtime limit."""
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
        source.command("migrate-set-parameters", max_bandwidth=SLOW, downtime_limit=1)
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


# -- block-bitmap-mapping ----------------------------------------------------------------------------------------------


def node(name: str, alias: str, *bitmaps: tuple[str, str]) -> dict[str, Any]:
    return {"node-name": name, "alias": alias, "bitmaps": [{"name": one, "alias": other} for one, other in bitmaps]}


WRONG: Final[list[list[Any]]] = [
    [node("n", "1a")],
    [node("n", "")],
    [node("n", "a b")],
    [node("n", "a" * 256)],
    [node("n" * 32, "a")],
    [node("n", "a"), node("n", "b")],
    [node("n", "a"), node("m", "a")],
    [node("n", "a", ("b", "x" * 256))],
    [node("n", "a", ("b" * 1024, "x"))],
    [node("n", "a", ("b", "x"), ("b", "y"))],
    [node("n", "a", ("b", "x"), ("c", "x"))],
    [{"node-name": "n"}],
    [node("n", "a"), node("m", "b") | {"more": 1}],
    [node("n", "a") | {"alias": 1}],
    [node("n", "a") | {"bitmaps": {}}],
    [node("n", "a") | {"bitmaps": [{"name": "b"}]}],
    ["n"],
]


@pytest.mark.usefixtures("every_qemu")
def test_a_wrong_mapping_is_refused_with_qemus_words() -> None:
    with Qemu(machine="none") as qemu, parking() as engine:
        for mapping in WRONG:
            with pytest.raises(QmpError) as theirs:
                qemu.command("migrate-set-parameters", block_bitmap_mapping=mapping)
            with pytest.raises(SettingsError) as ours:
                engine.set_parameters({"block-bitmap-mapping": mapping})
            assert str(theirs.value) == str(ours.value)


@pytest.mark.usefixtures("every_qemu")
def test_mapped_bitmaps_have_other_names_on_each_side() -> None:
    """QEMU calls the node s and one bitmap b; it is parked as parked/kept, and arrives as drive/back."""
    with (
        Qemu(*DISKS, paused=True) as source,
        parking("dirty-bitmaps") as engine,
        Qemu(*DISKS, incoming="defer") as destination,
    ):
        for qemu in (source, destination):
            qemu.capabilities("dirty-bitmaps")
        expected = with_bitmaps(source)[1]
        source.command("migrate-set-parameters", block_bitmap_mapping=[node("disk", "s", ("fine", "b"))])
        engine.set_parameters({"block-bitmap-mapping": [node("parked", "s", ("kept", "b"))]})
        park(source, engine, "tcp:127.0.0.1:0")
        assert isinstance(engine.machine, BlockMachine)
        (parked,) = engine.machine.block_nodes()
        assert (parked.name, [one.name for one in parked.bitmaps]) == ("parked", ["kept"])
        engine.set_parameters({"block-bitmap-mapping": [node("parked", "t", ("kept", "b"))]})
        destination.command("migrate-set-parameters", block_bitmap_mapping=[node("disk", "t", ("back", "b"))])
        send(engine, destination.listen())
        found = destination.command("x-debug-block-dirty-bitmap-sha256", node="disk", name="back")["sha256"]
        assert found == parked.bitmap("kept").sha256() == expected
