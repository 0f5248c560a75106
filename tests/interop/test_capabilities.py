"""Each capability of each QEMU, switched on at the source alone: it works, or both sides fail and migfw names it.

No capability may make the migration hang. The test asks each QEMU for its capabilities, so it fails for a new one that
is not in OUTCOMES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from corefw.states import MigrationStatus
from tests.helpers.engines import query_migrate
from tests.helpers.parking import PATIENCE, parking, prove, send, wait_parked
from tests.helpers.peers import find_peer, needs_peers, peer_parameters
from tests.helpers.qemu import Guest, Qemu, QmpError, needs_qemu, wait_until

pytestmark = [pytest.mark.qemu, needs_qemu]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a migration into migfw if the source has a capability on.

    works      the machine is parked, and continues
    names      otherwise migfw's error has this text
    needs      other capabilities that QEMU requires
    refusals   errors with which QEMU itself may refuse the capability or the migration; then nothing is sent
    """

    works: bool = False
    names: str = ""
    needs: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()


WORKS: Final = Outcome(works=True)

OUTCOMES: Final[Mapping[str, Outcome]] = {
    "xbzrle": Outcome(works=True, names="capability 'xbzrle'"),  # only a page that is sent again is encoded
    "rdma-pin-all": WORKS,
    "auto-converge": WORKS,
    "zero-blocks": WORKS,
    "compress": Outcome(names="capability 'compress'"),
    "events": WORKS,
    "postcopy-ram": WORKS,
    # QEMU 11.1 does not tell the destination; the source then waits in `colo` for x-colo-lost-heartbeat.
    "x-colo": Outcome(works=True, names="capability 'x-colo'", needs=("return-path",)),
    "release-ram": WORKS,
    "block": Outcome(names="capability 'block'"),
    "return-path": WORKS,
    "pause-before-switchover": WORKS,
    "multifd": Outcome(names="capability 'multifd'"),
    "dirty-bitmaps": WORKS,
    "postcopy-blocktime": WORKS,
    "late-block-activate": WORKS,
    "x-ignore-shared": Outcome(names="capability 'x-ignore-shared'"),
    "validate-uuid": WORKS,
    "background-snapshot": Outcome(works=True, refusals=("not supported by host kernel", "not compatible with guest")),
    "zero-copy-send": Outcome(names="capability 'multifd'", needs=("multifd",), refusals=("Zero copy",)),
    "postcopy-preempt": Outcome(works=True, needs=("postcopy-ram",)),
    "switchover-ack": Outcome(works=True, needs=("return-path",)),
    "dirty-limit": Outcome(refusals=("requires KVM",)),
    "mapped-ram": Outcome(refusals=("seekable",)),
}

ENDED: Final = ("completed", "failed", "cancelled", "colo")


@pytest.mark.parametrize("label", peer_parameters("5.2", "7.2", "10.0", "newest"))
def test_every_capability_of_a_qemu_has_an_outcome(label: str) -> None:
    with Qemu(machine="none", peer=find_peer(label)) as qemu:
        known = {one["capability"] for one in qemu.command("query-migrate-capabilities")}
    assert known <= OUTCOMES.keys()


def switch_on(source: Qemu, capability: str, outcome: Outcome) -> bool:
    """Switch the capability on; return whether this QEMU has it and allows that."""
    known = {one["capability"] for one in source.command("query-migrate-capabilities")}
    if not {capability, *outcome.needs} <= known:
        return False
    try:
        source.capabilities(*outcome.needs, capability)
    except QmpError as error:
        assert any(text in str(error) for text in outcome.refusals), error
        return False
    return True


def migrate(source: Qemu, uri: str, outcome: Outcome) -> bool:
    """Run the source's migration to its end, however it ends; False if QEMU refuses to begin."""
    try:
        source.migrate(uri)
    except QmpError as error:
        assert any(text in str(error) for text in outcome.refusals), error
        return False

    def ended() -> bool:
        if source.status() == "pre-switchover":
            source.command("migrate-continue", state="pre-switchover")
        return source.status() in ENDED

    wait_until(ended, "the end of the source's migration")
    return True


@pytest.mark.parametrize("capability", OUTCOMES)
@pytest.mark.parametrize("label", peer_parameters("5.2", "7.2", "10.0", "newest"))
def test_a_capability_of_the_source_works_or_is_named(label: str, capability: str, guest: Guest) -> None:
    outcome = OUTCOMES[capability]
    with Qemu(boot=guest.image, peer=find_peer(label)) as source, parking() as engine:
        if not switch_on(source, capability, outcome):
            return
        source.wait_printed("B")
        if not migrate(source, engine.migrate_incoming("tcp:127.0.0.1:0"), outcome):
            return
        status = engine.wait_incoming(PATIENCE)
        if outcome.works and status is MigrationStatus.COMPLETED:
            assert source.status() in ("completed", "colo")
        else:
            assert status is MigrationStatus.FAILED
            assert outcome.names, query_migrate(engine)
            assert outcome.names in query_migrate(engine)["error-desc"]


# -- switchover-ack ----------------------------------------------------------------------------------------------------

ACKS: Final = [
    ("10.0", "pc-i440fx-10.0"),
    ("10.0", "pc-i440fx-7.2"),
    ("newest", "pc-i440fx-11.1"),
    ("newest", "pc-i440fx-11.0"),
    ("newest", "pc-i440fx-7.2"),
]


@pytest.mark.parametrize("here", [False, True], ids=["there-alone", "on-both-sides"])
@pytest.mark.parametrize(
    ("label", "machine"),
    [pytest.param(label, machine, marks=needs_peers(label), id=f"{label}-{machine}") for label, machine in ACKS],
)
def test_switchover_ack(label: str, machine: str, here: bool, guest: Guest, folder: Path) -> None:
    """In both directions, with machine types before and after 11.1, which changed which side requests the message."""
    peer = find_peer(label)
    capabilities = ("return-path", "switchover-ack")
    with (
        Qemu(boot=guest.image, machine=machine, peer=peer) as source,
        parking(*(capabilities if here else ("return-path",))) as engine,
        Qemu(boot=guest.image, machine=machine, peer=peer, incoming=f"unix:{folder}/out") as destination,
    ):
        source.capabilities(*capabilities)
        destination.capabilities(*capabilities)
        source.wait_printed("B")
        source.migrate(engine.migrate_incoming(f"unix:{folder}/in"))
        source.wait_migrated()
        wait_parked(engine)
        send(engine, f"unix:{folder}/out")
        prove(guest, destination)


# -- devices that are sent before the RAM ------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("label", peer_parameters("10.0", "newest"))
def test_a_device_that_is_sent_before_the_ram_is_refused_by_name(label: str, early: bool, guest: Guest) -> None:
    """This concerns virtio-mem; with x-early-migration=off it is sent after the RAM, like everything else."""
    memory = (
        *("-m", "32M,maxmem=1G", "-object", "memory-backend-ram,id=memory,size=64M"),
        *("-device", f"virtio-mem-pci,memdev=memory,requested-size=0,x-early-migration={'on' if early else 'off'}"),
    )
    with Qemu(*memory, boot=guest.image, peer=find_peer(label)) as source, parking() as engine:
        source.wait_printed("B")
        source.migrate(engine.migrate_incoming("tcp:127.0.0.1:0"))
        if early:
            assert engine.wait_incoming(PATIENCE) is MigrationStatus.FAILED
            error = query_migrate(engine)["error-desc"]
            assert "virtio-mem" in error and "x-early-migration=off" in error
        else:
            wait_parked(engine)
