"""A real Linux moves while it runs, from one QEMU through migfw into a QEMU of another version, in precopy and in
postcopy."""

from __future__ import annotations

import pytest

from tests.helpers.linux import Linux, build_linux, check_counts, counts, needs_linux, wait_counted
from tests.helpers.parking import park, parking, send
from tests.helpers.peers import find_peer, needs_peers
from tests.helpers.postcopying import IntoMigfw, OutOfMigfw
from tests.helpers.qemu import Qemu, needs_qemu

pytestmark = [pytest.mark.qemu, needs_qemu, needs_linux, pytest.mark.timeout(400)]


@pytest.fixture(scope="session")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Linux:
    return build_linux(tmp_path_factory.mktemp("linux"))


@pytest.mark.parametrize(
    ("origin", "target", "machine", "postcopy"),
    [
        pytest.param(origin, target, machine, postcopy, marks=needs_peers(origin, target), id=f"{origin}-to-{target}")
        for origin, target, machine, postcopy in (
            ("5.2", "newest", "pc-q35-5.2", False),
            ("newest", "10.0", "pc-i440fx-10.0", True),
        )
    ],
)
def test_linux_goes_on_with_its_memory(origin: str, target: str, machine: str, postcopy: bool, linux: Linux) -> None:
    hardware = ("-smp", "2", "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci", *linux.arguments)
    with (
        Qemu(*hardware, memory="160M", machine=machine, peer=find_peer(origin)) as source,
        parking() as engine,
        Qemu(*hardware, memory="160M", machine=machine, peer=find_peer(target), incoming="defer") as destination,
    ):
        wait_counted(source, 3)
        if postcopy:
            IntoMigfw(source, engine).complete()
            OutOfMigfw(destination, engine).complete()
        else:
            park(source, engine, "tcp:127.0.0.1:0")
            send(engine, destination.listen())
        destination.wait_running()
        wait_counted(destination, 3)
        check_counts(counts(source), counts(destination))
