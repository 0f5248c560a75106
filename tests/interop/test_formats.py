"""Snapshots and save files of real QEMUs: parked, inspected, stored, and woken up in a QEMU of the same version."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from struct import pack

import pytest

from corefw.inspection import inspect
from corefw.inspection.source import FileSource
from tests.helpers.parking import parking, prove, send, wait_parked
from tests.helpers.peers import find_peer, peer_parameters
from tests.helpers.qemu import Guest, Qemu, needs_qemu

pytestmark = [pytest.mark.qemu, needs_qemu]

LIBVIRT_HEADER = b"LibvirtQemudSave" + pack("<5I56x", 2, 4096, 1, 0, 0) + bytes(4096)
LIBVIRT_GZIP = b"LibvirtQemudSave" + pack("<5I56x", 2, 4096, 1, 1, 0) + bytes(4096)


def machine(version: str, guest: Guest, **options: str) -> Qemu:
    return Qemu(boot=guest.image, peer=find_peer(version), **options)  # type: ignore[arg-type]


def check_inspected(path: Path, offset: int = 0) -> None:
    with FileSource.open(str(path), offset) as source:
        found = inspect(source)
    assert found.complete, found.damage or found.missing
    assert found.blocks["pc.ram"].absent == 0
    assert {"cpu", "timer", "globalstate"} <= {section.idstr for section in found.sections}


def wake(version: str, guest: Guest, folder: Path, uri: str) -> None:
    """Park the machine at the URI, and wake it up in a QEMU, once directly and once from a file that migfw stored."""
    with parking() as first, parking() as second:
        first.migrate_incoming(uri)
        wait_parked(first)
        send(first, f"file:{folder}/stored")
        check_inspected(folder / "stored")
        second.migrate_incoming(f"file:{folder}/stored")
        wait_parked(second)
        for number, engine in enumerate((first, second)):
            address = f"unix:{folder}/out{number}"
            with machine(version, guest, incoming=address) as destination:
                send(engine, address)
                prove(guest, destination)


@pytest.mark.parametrize("version", peer_parameters("7.2", "10.0", "newest"))
def test_a_background_snapshot(version: str, guest: Guest, folder: Path) -> None:
    with machine(version, guest) as source:
        source.wait_printed("B")
        source.capabilities("background-snapshot")
        source.migrate(f"exec:cat > {folder}/snapshot")
        source.wait_migrated()
        seen = source.printed().count("B")
        source.wait_printed("B", seen + 2)  # the guest goes on
    check_inspected(folder / "snapshot")
    wake(version, guest, folder, f"file:{folder}/snapshot")


def test_a_background_snapshot_over_a_socket(guest: Guest, folder: Path) -> None:
    with machine("7.2", guest) as source, parking() as engine, machine("7.2", guest, incoming="defer") as destination:
        source.wait_printed("B")
        source.capabilities("background-snapshot")
        source.migrate(engine.migrate_incoming(f"unix:{folder}/in"))
        wait_parked(engine)
        source.wait_migrated()
        destination.command("migrate-incoming", uri=f"unix:{folder}/out")
        send(engine, f"unix:{folder}/out")
        prove(guest, destination)


@pytest.mark.parametrize("capabilities", [(), ("multifd",)], ids=["alone", "multifd"])
@pytest.mark.parametrize("version", peer_parameters("10.0", "newest"))
def test_a_mapped_ram_file(version: str, capabilities: tuple[str, ...], guest: Guest, folder: Path) -> None:
    with machine(version, guest) as source:
        source.wait_printed("B")
        source.capabilities("mapped-ram", *capabilities)
        source.migrate(f"file:{folder}/mapped")
        source.wait_migrated()
    check_inspected(folder / "mapped")
    wake(version, guest, folder, f"file:{folder}/mapped")


@pytest.mark.parametrize("capabilities", [(), ("mapped-ram",)], ids=["stream", "mapped-ram"])
@pytest.mark.parametrize("version", peer_parameters("10.0", "newest"))
def test_a_file_with_an_offset(version: str, capabilities: tuple[str, ...], guest: Guest, folder: Path) -> None:
    path, kept = folder / "file", b"kept" * 1250
    path.write_bytes(kept)
    with machine(version, guest) as source:
        source.wait_printed("B")
        source.capabilities(*capabilities)
        source.migrate(f"file:{path},offset=5000")
        source.wait_migrated()
    assert path.read_bytes().startswith(kept)
    check_inspected(path, 5000)
    wake(version, guest, folder, f"file:{path},offset=5000")


@pytest.mark.parametrize("version", peer_parameters("10.0", "newest"))
def test_qemu_reads_the_file_with_an_offset_that_migfw_writes(version: str, guest: Guest, folder: Path) -> None:
    path, kept = folder / "file", b"kept" * 1250
    path.write_bytes(kept)
    with machine(version, guest) as source, parking() as engine:
        source.wait_printed("B")
        source.migrate(engine.migrate_incoming(f"unix:{folder}/in"))
        wait_parked(engine)
        send(engine, f"file:{path},offset=5000")
    assert path.read_bytes().startswith(kept)
    with machine(version, guest, incoming=f"file:{path},offset=5000") as destination:
        prove(guest, destination)


@pytest.mark.parametrize(
    ("header", "compress"), [(LIBVIRT_HEADER, bytes), (LIBVIRT_GZIP, gzip.compress)], ids=["raw", "gzip"]
)
def test_a_save_image_of_libvirt(header: bytes, compress: Callable[[bytes], bytes], guest: Guest, folder: Path) -> None:
    with machine("7.2", guest) as source:
        source.wait_printed("B")
        source.migrate(f"exec:cat > {folder}/stream")
        source.wait_migrated()
    (folder / "image").write_bytes(header + compress((folder / "stream").read_bytes()))
    check_inspected(folder / "image")
    wake("7.2", guest, folder, f"file:{folder}/image")
