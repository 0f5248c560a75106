"""The parameter block-bitmap-mapping: QEMU's errors, and its effect on each side."""

from __future__ import annotations

from typing import Any

import pytest
from corefw_dirty_bitmap import corefw_blockers, corefw_settings
from corefw_dirty_bitmap.load import BitmapLoader
from corefw_dirty_bitmap.save import BitmapSaver

from corefw.channel import Interrupt
from corefw.errors import BlockedError, RemoteStreamError, SettingsError
from corefw.machine import BlockMachine
from corefw.settings import Settings
from corefw.testing.recording import KitContext
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from tests.helpers.disks import MIB, Disk, DiskMachine, state_of

MAPPING = "block-bitmap-mapping"


def settings(*nodes: dict[str, Any], mapped: bool = True) -> Settings:
    made = Settings([corefw_settings()])
    made.set_capabilities({"dirty-bitmaps": True})
    if mapped:
        made.set_parameters({MAPPING: list(nodes)})
    return made


def node(name: str, alias: str, *bitmaps: dict[str, Any]) -> dict[str, Any]:
    return {"node-name": name, "alias": alias, "bitmaps": list(bitmaps)}


def bitmap(name: str, alias: str, **more: object) -> dict[str, Any]:
    return {"name": name, "alias": alias, **more}


def moved(source: BlockMachine, destination: BlockMachine, there: Settings, here: Settings) -> None:
    """Send all bitmaps from one machine to the other, START and END."""
    saver, loader = BitmapSaver(source, there), BitmapLoader(destination, here)
    sink = MemorySink()
    writer = StreamWriter(sink)
    saver.setup(writer, KitContext(there, Interrupt()))
    saver.complete(writer)
    writer.flush()
    saver.cleanup()
    reader = StreamReader(MemorySource(bytes(sink.data)))
    loader.setup(KitContext(here, Interrupt()))
    try:
        loader.load(reader, 1)
        loader.load(reader, 1)
    except RemoteStreamError:
        loader.cleanup()
        loader.abandoned()
        raise
    loader.cleanup()
    loader.committed()


@pytest.mark.parametrize(
    ("mapping", "error"),
    [
        ([node("n", "1a")], "The node alias '1a' is not well-formed"),
        ([node("n", "a" * 256)], "is longer than 255 bytes"),
        ([node("n" * 32, "a")], "is longer than 31 bytes"),
        ([node("n", "a"), node("n", "b")], "The node name 'n' is mapped twice"),
        ([node("n", "a"), node("m", "a")], "The node alias 'a' is used twice"),
        ([node("n", "a", bitmap("b", "x" * 256))], "The bitmap alias 'x*' is longer than 255 bytes"),
        ([node("n", "a", bitmap("b" * 1024, "x"))], "The bitmap name 'b*' is longer than 1023 bytes"),
        ([node("n", "a", bitmap("b", "x"), bitmap("b", "y"))], "The bitmap 'n'/'b' is mapped twice"),
        ([node("n", "a", bitmap("b", "x"), bitmap("c", "x"))], "The bitmap alias 'a'/'x' is used twice"),
        ([{"node-name": "n", "alias": "a"}], r"Parameter 'block-bitmap-mapping\[0\].bitmaps' is missing"),
        ([node("n", "a") | {"more": 1}], "more' is unexpected"),
        ([node("n", "a", bitmap("b", "x", transform={"persistent": 1}))], "transform.persistent', expected: boolean"),
        (["n"], "expected: object"),
        ([node("n", 1)], "alias', expected: string"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_mapping_is_refused_with_qemus_text(mapping: list[Any], error: str) -> None:
    with pytest.raises(SettingsError, match=error):
        settings(*mapping)


def test_names_are_translated_and_what_is_not_mapped_stays() -> None:
    """Both aliases, a transformation on each side, and a bitmap and a node that are not mapped."""
    system, data = Disk("system", MIB, device="drive0"), Disk("data", MIB)
    for name in ("daily", "weekly", "other"):
        system.add_bitmap(name, 65536)
    data.add_bitmap("daily", 65536)
    system.write(0, 1)
    source, arrived = DiskMachine(system, data), DiskMachine(Disk("root", MIB), incoming=True)
    persistent = {"persistent": True}
    there = settings(node("system", "s", bitmap("daily", "d", transform=persistent), bitmap("weekly", "w")))
    here = settings(node("root", "s", bitmap("monday", "d"), bitmap("any", "w", transform=persistent)))
    moved(source, arrived, there, here)
    assert {key: (state[0], state[2]) for key, state in state_of(arrived).items()} == {
        ("root", "monday"): (65536, True),
        ("root", "any"): (65536, True),
    }
    assert arrived.disks[0].bitmap("monday").sha256() == system.bitmap("daily").sha256()
    for machine in (source, arrived):
        machine.close()


def test_an_empty_mapping_sends_nothing_and_none_sends_all_by_their_devices_names() -> None:
    disk = Disk("node", MIB, device="drive0")
    disk.add_bitmap("b", 65536)
    with DiskMachine(disk) as source, DiskMachine(Disk("drive0", MIB), incoming=True) as arrived:
        assert not BitmapSaver(source, settings()).active()
        unset = settings(mapped=False)
        assert BitmapSaver(source, unset).active()
        moved(source, arrived, unset, unset)
        assert [key for key, _ in state_of(arrived).items()] == [("drive0", "b")]


@pytest.mark.parametrize(
    ("here", "error"),
    [
        (settings(), "Unknown node alias 'disk'"),
        (settings(node("disk", "disk")), "Unknown bitmap alias 'b' on node 'disk'"),
        (settings(node("gone", "disk", bitmap("b", "b"))), "expected the name of a block node of this machine"),
        (settings(node("disk", "disk", bitmap("taken", "b"))), "already exists on destination"),
    ],
)
def test_a_bitmap_that_has_no_place_here_is_refused_at_its_start(here: Settings, error: str) -> None:
    there, target = Disk("disk", MIB), Disk("disk", MIB)
    there.add_bitmap("b", 65536)
    target.add_bitmap("taken", 65536)
    with DiskMachine(there) as source, DiskMachine(target, incoming=True) as arrived:
        with pytest.raises(RemoteStreamError, match=error):
            moved(source, arrived, settings(mapped=False), here)
        assert [one.name for one in target.bitmaps] == ["taken"]


def test_bitmaps_that_cannot_be_used_block_a_migration() -> None:
    disk = Disk("disk", MIB)
    broken, busy, long = (
        disk.add_bitmap("broken", 65536),
        disk.add_bitmap("busy", 65536),
        disk.add_bitmap("l" * 300, 65536),
    )
    broken.mark_inconsistent()
    busy.set_busy(True)
    with DiskMachine(disk) as machine:
        reasons = list(corefw_blockers(machine, settings(mapped=False)))
        assert [reason.split("'")[3][:6] for reason in reasons] == ["llllll", "busy", "broken"]
        assert "in use by another operation" in reasons[1]
        assert "inconsistent" in reasons[2]
        assert "block-bitmap-mapping" in reasons[0]
        with pytest.raises(BlockedError):
            BitmapSaver(machine, settings(mapped=False)).active()
        assert not list(corefw_blockers(machine, settings(node("disk", "d", bitmap(long.name, "l")))))
        assert not list(corefw_blockers(machine, Settings([corefw_settings()]))), "they stay, as QEMU's do"
