"""Dirty bitmaps move with a machine from one QEMU through migfw into another, and every bit arrives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest

from corefw.block import DirtyBitmap
from corefw.errors import BlockedError, SettingsError
from corefw.machine import BlockMachine
from corefw.states import MigrationStatus
from tests.helpers.cutting import Cut, CutProxy, Watch
from tests.helpers.parking import PATIENCE, park, parking, send, wait_parked
from tests.helpers.peers import peer_parameters, using_peer
from tests.helpers.postcopying import there_and_back
from tests.helpers.qemu import Guest, Qemu, QmpError, needs_qemu

pytestmark = [pytest.mark.qemu, needs_qemu]

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

FIRST_BITS: Final = re.compile(b"[\x44\x4c](\x04disk)?\x04fine")
"""The first record with bits of "fine"."""


def with_bitmaps(source: Qemu) -> list[str]:
    """Create the bitmaps, write to the disks, and return the bitmaps' digests."""
    for bitmap in BITMAPS:
        source.command("block-dirty-bitmap-add", **bitmap)
    for write in WRITES:
        source.command("human-monitor-command", command_line=f"qemu-io {write}")
    return digests(source)


def digest(qemu: Qemu, node_name: str, name: str) -> str:
    return str(qemu.command("x-debug-block-dirty-bitmap-sha256", node=node_name, name=name)["sha256"])


def digests(qemu: Qemu) -> list[str]:
    return [digest(qemu, one["node"], one["name"]) for one in BITMAPS]


def bitmaps_here(machine: object) -> list[DirtyBitmap]:
    assert isinstance(machine, BlockMachine)
    found = []
    for one in BITMAPS:
        node = machine.find_node(one["node"])
        assert node is not None
        found.append(node.bitmap(one["name"]))
    return found


def digests_here(machine: object) -> list[str]:
    return [one.sha256() for one in bitmaps_here(machine)]


def recording(qemu: Qemu) -> dict[tuple[str, str], bool]:
    """Whether each bitmap records writes."""
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
    """Into the parked machine, and out of it. QEMU is slow at first, so that pages are left when it switches (otherwise
    5.2 hangs), and the bits do not fit into its downtime limit."""
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


# -- connections that break --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", peer_parameters("5.2", "newest"))
def test_a_break_before_the_bits_loses_none(label: str, guest: Guest) -> None:
    """QEMU sends them after the RAM. On the way out they have arrived before the guest starts."""
    with using_peer(label), there_and_back(guest, "dirty-bitmaps", arguments=DISKS) as moves:
        arriving, leaving = moves
        expected = with_bitmaps(arriving.qemu)
        for move in moves:
            with CutProxy(move.listen()) as proxy:
                move.begin(proxy.uri)
                move.both_reach("postcopy-active")
                proxy.cut_all(Cut.RESET)
                move.both_reach("postcopy-paused")
                proxy.lead_to(move.listen_again())
                move.resume(proxy.uri)
                move.both_reach("postcopy-active")
                move.finish()
            assert digests_here(move.engine.machine) == expected
        assert digests(leaving.qemu) == expected


@pytest.mark.parametrize("label", peer_parameters("5.2", "7.2"))  # newer ones fail, and keep the machine
def test_a_break_amid_the_bits_leaves_no_bitmap_that_is_wrong(label: str, guest: Guest) -> None:
    """The break is within a record of "fine". The RAM has arrived, and QEMU does not resume after this, so the machine
    is parked without these bits."""
    with using_peer(label), there_and_back(guest, "dirty-bitmaps", arguments=DISKS) as (arriving, leaving):
        engine = arriving.engine
        expected = with_bitmaps(arriving.qemu)
        with CutProxy(arriving.listen()) as proxy:
            proxy.stop_at(Watch(True, FIRST_BITS, 600, lambda: proxy.cut(Cut.HALF_FORWARD)))
            arriving.begin(proxy.uri)
            arriving.both_reach("postcopy-active")
            arriving.qemu.command("migrate-set-parameters", max_postcopy_bandwidth=0)
            wait_parked(engine)
        assert not arriving.qemu.command("query-status")["running"]
        arrived = bitmaps_here(engine.machine)
        lost = [one for one in arrived if one.inconsistent]
        assert "fine" in [one.name for one in lost]
        listening = leaving.listen()
        with pytest.raises(
            BlockedError, match=r"'fine' is inconsistent and cannot be used .*block-dirty-bitmap-remove"
        ):
            engine.migrate(listening)
        for one in lost:
            one.node.remove_bitmap(one)
        leaving.begin(listening)
        leaving.both_reach("postcopy-active")
        leaving.finish()
        for one, sent in zip(arrived, expected, strict=True):
            if one not in lost:
                assert one.sha256() == digest(leaving.qemu, one.node.name, one.name) == sent


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


@pytest.mark.parametrize("label", peer_parameters("7.2", "newest"))  # 5.2 has no transform
def test_a_transform_says_whether_a_bitmap_is_persistent(label: str) -> None:
    """On each side, and whatever the stream says."""

    def persistent(name: str, alias: str, bitmap: str, other: str, value: bool) -> list[dict[str, Any]]:
        bitmaps = [{"name": bitmap, "alias": other, "transform": {"persistent": value}}]
        return [{"node-name": name, "alias": alias, "bitmaps": bitmaps}]

    with (
        using_peer(label),
        Qemu(*DISKS, paused=True) as source,
        parking("dirty-bitmaps") as engine,
        parking("dirty-bitmaps") as other,
        Qemu(*DISKS, incoming="defer") as destination,
    ):
        for qemu in (source, destination):
            qemu.capabilities("dirty-bitmaps")
        expected = with_bitmaps(source)[1]
        source.command("migrate-set-parameters", block_bitmap_mapping=persistent("disk", "s", "fine", "b", True))
        engine.set_parameters({"block-bitmap-mapping": [node("parked", "s", ("kept", "b"))]})
        park(source, engine, "tcp:127.0.0.1:0")
        (first,) = the_bitmaps(engine.machine)
        assert (first.name, first.persistent, first.sha256()) == ("kept", True, expected)
        engine.set_parameters({"block-bitmap-mapping": persistent("parked", "t", "kept", "c", False)})
        other.set_parameters({"block-bitmap-mapping": persistent("again", "t", "fine", "c", True)})
        send(engine, other.migrate_incoming("tcp:127.0.0.1:0"))
        wait_parked(other)
        (second,) = the_bitmaps(other.machine)
        assert (second.name, second.persistent, second.sha256()) == ("fine", True, expected)
        other.set_parameters({"block-bitmap-mapping": [node("again", "u", ("fine", "d"))]})
        destination.command("migrate-set-parameters", block_bitmap_mapping=persistent("disk", "u", "fine", "d", False))
        send(other, destination.listen())
        nodes = destination.command("query-named-block-nodes")
        (third,) = [one for found in nodes for one in found.get("dirty-bitmaps", ())]
        assert (third["name"], third["persistent"]) == ("fine", False)
        assert digest(destination, "disk", "fine") == expected


def the_bitmaps(machine: object) -> list[DirtyBitmap]:
    assert isinstance(machine, BlockMachine)
    return [one for found in machine.block_nodes() for one in found.bitmaps]
