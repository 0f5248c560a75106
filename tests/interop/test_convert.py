"""Streams that a QEMU stored are converted. Another version of QEMU loads them and continues the guest, or refuses what
the conversion has reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from tests.helpers.cli import migfw
from tests.helpers.parking import prove
from tests.helpers.peers import Peer, find_peer, needs_peers, peer_parameters, the_peer
from tests.helpers.qemu import PATIENCE, Guest, Qemu, needs_qemu, wait_until

pytestmark = [pytest.mark.qemu, needs_qemu, needs_peers("7.2", "10.0")]

HOST_MODULES: Final = Path("/usr/lib/x86_64-linux-gnu/qemu")
DEVICES: Final = (
    *("-device", "VGA,vgamem_mb=1", "-device", "virtio-net-pci,romfile=", "-device", "virtio-rng-pci"),
    *("-device", "virtio-scsi-pci", "-device", "virtio-serial-pci", "-device", "usb-ehci"),
)
BALLOON: Final = ("-device", "virtio-balloon-pci")
"""Machine types before 10.0 create it without MSI-X, so it loads only if the machine type stays the same."""


def machine_type(board: str, program: Peer) -> str:
    return f"pc-{board}-{program.version[0]}.{program.version[1]}"


def store(guest: Guest, machine: str, program: Peer, path: Path, *devices: str) -> None:
    """Run the guest in a QEMU and store its stream as QEMU sends it."""
    with Qemu(*devices, boot=guest.image, machine=machine, peer=program) as source:
        source.wait_printed("B")
        source.migrate(f"exec:cat > {path}")
        source.wait_migrated()


def tables(machine: str, program: Peer, path: Path) -> str:
    """The file that -dump-vmstate writes. For this QEMU loads every module. If its folder lacks one, it takes that of
    the host's QEMU, of another version, and ends. So each missing module is replaced by a file that is none."""
    environment = dict(program.environment)
    if "QEMU_MODULE_DIR" in environment:
        own, modules = Path(environment["QEMU_MODULE_DIR"]), path.with_suffix(".modules")
        modules.mkdir()
        for one in own.glob("*.so"):
            (modules / one.name).symlink_to(one)
        for one in HOST_MODULES.glob("*.so"):
            if not (modules / one.name).exists():
                (modules / one.name).write_text("no module")
        environment["QEMU_MODULE_DIR"] = str(modules)
    subprocess.run(
        [*program.command, "-M", machine, "-display", "none", "-nodefaults", "-dump-vmstate", str(path)],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    return str(path)


def convert(folder: Path, machine: str, source: Peer, destination: Peer) -> tuple[int, Any]:
    done = migfw(
        *("convert", f"{folder}/in", f"{folder}/out", "--machine", machine, "--json"),
        *("--from-vmstate", tables(machine_type("i440fx", source), source, folder / "from")),
        *("--to-vmstate", tables(machine, destination, folder / "to")),
    )
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("origin", "target"),
    [(*pair,) for pair in (("10.0", "7.2"), ("newest", "7.2"), ("7.2", "10.0"), ("newest", "10.0"))],
)
def test_a_converted_stream_runs_on_in_another_version(origin: str, target: str, guest: Guest, folder: Path) -> None:
    if find_peer(origin) is None:
        pytest.skip(f"needs QEMU {origin}: run 'make peers'")
    source, destination = the_peer(origin), the_peer(target)
    before, after = machine_type("i440fx", source), machine_type("i440fx", destination)
    store(guest, before, source, folder / "in", *DEVICES)
    with Qemu(*DEVICES, machine=after, peer=destination, incoming="defer") as refusing:
        refused = _load(refusing, folder / "in")
        assert "Machine type received" in refused, "without a conversion it does not load"
    status, report = convert(folder, after, source, destination)
    assert (status, report["problems"]) == (0, []), report
    assert report["devices"]["compared"] > 20
    with Qemu(*DEVICES, machine=after, peer=destination, incoming="defer") as loading:
        loading.command("migrate-incoming", uri=f"exec:cat {folder}/out")
        prove(guest, loading)


def _load(qemu: Qemu, path: Path) -> str:
    """The error of a QEMU that refuses a stream and ends."""
    with contextlib.suppress(AssertionError):  # it may end before it has answered
        qemu.command("migrate-incoming", uri=f"exec:cat {path}")
    wait_until(lambda: qemu.process.poll() is not None, "QEMU to refuse the stream")
    return qemu.output()


def test_what_does_not_load_was_said(guest: Guest, folder: Path) -> None:
    """The e1000e of QEMU 10.0 has a timer that 7.2's does not know."""
    source, destination = the_peer("10.0"), the_peer("7.2")
    store(guest, "pc-q35-10.0", source, folder / "in", "-device", "e1000e,romfile=")
    status, report = convert(folder, "pc-q35-7.2", source, destination)
    assert status == 1
    (problem,) = report["problems"]
    assert "e1000e" in problem
    assert "core.timadj" in problem
    with Qemu("-device", "e1000e,romfile=", machine="pc-q35-7.2", peer=destination, incoming="defer") as loading:
        assert "e1000e" in _load(loading, folder / "out")


@pytest.mark.parametrize("board", ["i440fx", "q35"])
@pytest.mark.parametrize("origin", peer_parameters("10.0", "newest"))
def test_a_machine_type_that_was_held_needs_no_change(origin: str, board: str, guest: Guest, folder: Path) -> None:
    destination = the_peer("7.2")
    machine = machine_type(board, destination)
    store(guest, machine, the_peer(origin), folder / "in", *DEVICES, *BALLOON)
    status, report = convert(folder, machine, the_peer(origin), destination)
    assert (status, report["problems"], report["changes"]) == (0, [], [])
    assert (folder / "out").read_bytes() == (folder / "in").read_bytes()
    with Qemu(*DEVICES, *BALLOON, machine=machine, peer=destination, incoming="defer") as loading:
        loading.command("migrate-incoming", uri=f"exec:cat {folder}/out")
        prove(guest, loading)
