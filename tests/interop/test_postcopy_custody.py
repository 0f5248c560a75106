"""Which side has a machine after its postcopy failed; it may leave again in precopy or into a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cutting import Cut, CutProxy, Watch
from tests.helpers.engines import query_migrate
from tests.helpers.parking import parking, prove, send, wait_parked
from tests.helpers.peers import peer_parameters, using_peer
from tests.helpers.postcopying import LISTEN, IntoMigfw, OutOfMigfw
from tests.helpers.qemu import Guest, Qemu, needs_qemu, wait_until
from tests.matrix.points import SHUT

pytestmark = [pytest.mark.qemu, needs_qemu]

BARE = ("-global", "migration.send-configuration=off", "-global", "migration.send-section-footer=off")
"""Nothing in the stream says where a device section ends."""


@pytest.mark.parametrize("label", peer_parameters("5.2", "newest"))
def test_a_machine_that_came_in_postcopy_is_stored(label: str, guest: Guest, folder: Path) -> None:
    with (
        using_peer(label),
        Qemu(*BARE, machine="pc,suppress-vmdesc=on", boot=guest.image) as source,
        parking() as engine,
        parking() as other,
        Qemu(*BARE, machine="pc,suppress-vmdesc=on", boot=guest.image, incoming="defer") as destination,
    ):
        source.wait_printed("B")
        IntoMigfw(source, engine).complete()
        engine.set_capabilities({"postcopy-ram": False})
        send(engine, f"file:{folder}/stored")
        other.migrate_incoming(f"file:{folder}/stored")
        wait_parked(other)
        OutOfMigfw(destination, other).complete()
        prove(guest, destination)


@pytest.mark.usefixtures("every_qemu")
def test_a_machine_that_came_in_postcopy_leaves_in_precopy(guest: Guest) -> None:
    """With a return path, QEMU waits for a description before it confirms."""
    with (
        Qemu(boot=guest.image) as source,
        parking() as engine,
        Qemu(boot=guest.image, incoming="defer") as destination,
    ):
        source.wait_printed("B")
        IntoMigfw(source, engine).complete()
        destination.capabilities("return-path")
        engine.set_capabilities({"postcopy-ram": False, "return-path": True})
        send(engine, destination.listen())
        prove(guest, destination)


@pytest.mark.parametrize("postcopy", [False, True])
@pytest.mark.parametrize("label", peer_parameters("newest"))
def test_a_qemu_that_does_not_hear_that_its_machine_is_parked_goes_on(label: str, postcopy: bool, guest: Guest) -> None:
    """Nothing here can prevent that, so the user is warned (docs/qemu.md). An older QEMU waits for ever in postcopy."""
    with using_peer(label), Qemu(boot=guest.image) as source, parking() as engine:
        source.wait_printed("B")
        with CutProxy(engine.migrate_incoming(LISTEN)) as proxy:
            proxy.stop_at(Watch(False, SHUT, 0, lambda: proxy.cut(Cut.RESET)))
            source.capabilities("return-path")
            if postcopy:
                arriving = IntoMigfw(source, engine)
                arriving.begin(proxy.uri)
                source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
            else:
                source.command("migrate", uri=proxy.uri)
            wait_parked(engine)
            wait_until(lambda: source.status() == "failed", "QEMU to fail")
        source.wait_running()
        wait_until(lambda: query_migrate(engine).get("x-migfw", {}).get("warnings"), "the warning")
        assert "may not know that the guest has arrived" in query_migrate(engine)["x-migfw"]["warnings"][0]


@pytest.mark.parametrize("label", peer_parameters("7.2", "newest"))
def test_a_destination_that_cannot_load_the_devices(label: str, guest: Guest) -> None:
    """QEMU ends. From 10.0 on it reports why over the return path. An older one only fails to confirm the devices, so
    the user decides. Then the machine may leave for another destination."""
    device = ("-device", "virtio-rng-pci")
    with (
        using_peer(label),
        Qemu(*device, boot=guest.image) as source,
        parking() as engine,
        Qemu(boot=guest.image, incoming="defer") as wrong,
        Qemu(*device, boot=guest.image, incoming="defer") as right,
    ):
        source.wait_printed("B")
        IntoMigfw(source, engine).complete()
        failing = OutOfMigfw(wrong, engine)
        failing.begin(failing.listen())
        wait_until(lambda: engine.outgoing.status in ("postcopy-paused", "failed"), "the end of QEMU")
        if label == "7.2":
            engine.cancel()
            wait_until(lambda: engine.outgoing.status == "cancelled", "the cancel")
        assert engine.outgoing.status in ("failed", "cancelled")
        OutOfMigfw(right, engine).complete()
        prove(guest, right)
