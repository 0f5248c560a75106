"""A machine moves from one QEMU through migfw into a QEMU of another version, and continues there.

All use the same versioned machine type, as users do. Each version is a source and a destination at least once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.helpers.parking import park, parking, prove, send, wait_parked
from tests.helpers.peers import needs_peers, peer_parameters, the_peer
from tests.helpers.postcopying import IntoMigfw, OutOfMigfw
from tests.helpers.qemu import Guest, Qemu, needs_qemu

pytestmark = [pytest.mark.qemu, needs_qemu]

PC_DEVICES: Final = (
    *("-smp", "2", "-device", "VGA,vgamem_mb=1", "-device", "e1000e,romfile="),
    *("-device", "virtio-net-pci,romfile=", "-device", "virtio-balloon-pci", "-device", "virtio-rng-pci"),
    *("-device", "virtio-scsi-pci,id=scsi", "-device", "scsi-hd,bus=scsi.0,drive=scsi-disk"),
    *("-drive", "if=none,id=scsi-disk,driver=null-co,size=1M,read-zeroes=on"),
    *("-device", "virtio-blk-pci,drive=virtio-disk"),
    *("-drive", "if=none,id=virtio-disk,driver=null-co,size=1M,read-zeroes=on"),
    *("-device", "virtio-serial-pci", "-device", "qemu-xhci", "-device", "usb-tablet"),
)
Q35_DEVICES: Final = (
    *("-smp", "2", "-device", "pcie-root-port,id=slot1,chassis=1"),
    *("-device", "virtio-net-pci,bus=slot1,romfile="),
    *PC_DEVICES[2:],
)


@pytest.mark.parametrize("label", peer_parameters("10.0", "newest"))
def test_switchover_start_goes_on_only_where_it_came(label: str, guest: Guest, folder: Path) -> None:
    """Machine types from 10.0 on send SWITCHOVER_START. Older ones do not, and a QEMU that does not know the command
    refuses it; the next test has both."""
    machine, program, away = "pc-i440fx-10.0", the_peer(label), f"unix:{folder}/out"
    with (
        Qemu(boot=guest.image, machine=machine, peer=program) as source,
        parking() as engine,
        Qemu(boot=guest.image, machine=machine, peer=program, incoming=away) as destination,
    ):
        source.wait_printed("B")
        park(source, engine, f"unix:{folder}/in")
        send(engine, f"file:{folder}/stored")
        assert b"\x08\x00\x0b\x00\x00\x03" in (folder / "stored").read_bytes(), "SWITCHOVER_START, then END"
        with parking() as other:
            other.migrate_incoming(f"file:{folder}/stored")
            wait_parked(other)
            send(other, away)
        prove(guest, destination)


@pytest.mark.parametrize(
    ("origin", "target", "machine"),
    [
        pytest.param(origin, target, machine, marks=needs_peers(origin, target), id=f"{origin}-to-{target}")
        for origin, target, machine in (("5.2", "newest", "pc-i440fx-5.2"), ("newest", "7.2", "pc-q35-5.2"))
    ],
)
def test_a_machine_goes_between_versions_in_postcopy(origin: str, target: str, machine: str, guest: Guest) -> None:
    devices = Q35_DEVICES if "q35" in machine else PC_DEVICES
    with (
        Qemu(*devices, boot=guest.image, machine=machine, peer=the_peer(origin)) as source,
        parking() as engine,
        Qemu(*devices, boot=guest.image, machine=machine, peer=the_peer(target), incoming="defer") as destination,
    ):
        source.wait_printed("B")
        IntoMigfw(source, engine).complete()
        OutOfMigfw(destination, engine).complete()
        prove(guest, destination)


@pytest.mark.parametrize("way", ["tcp", "file"])
@pytest.mark.parametrize("machine", ["pc-i440fx-5.2", "pc-q35-5.2"])
@pytest.mark.parametrize(
    ("origin", "target"),
    [
        pytest.param(origin, target, marks=needs_peers(origin, target), id=f"{origin}-to-{target}")
        for origin, target in (("5.2", "newest"), ("7.2", "5.2"), ("10.0", "7.2"), ("newest", "10.0"))
    ],
)
def test_a_machine_goes_between_versions(
    origin: str, target: str, machine: str, way: str, guest: Guest, folder: Path
) -> None:
    devices = Q35_DEVICES if "q35" in machine else PC_DEVICES
    with (
        Qemu(*devices, boot=guest.image, machine=machine, peer=the_peer(origin)) as source,
        parking() as engine,
        Qemu(*devices, boot=guest.image, machine=machine, peer=the_peer(target), incoming="defer") as destination,
    ):
        source.wait_printed("B")
        park(source, engine, "tcp:127.0.0.1:0")
        if way == "file":
            send(engine, f"file:{folder}/stored")
            with parking() as other:
                other.migrate_incoming(f"file:{folder}/stored")
                wait_parked(other)
                send(other, destination.listen())
        else:
            send(engine, destination.listen())
        prove(guest, destination)
