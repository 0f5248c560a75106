"""A real QEMU's machine moves in postcopy into a parked machine and out of one, and every byte of its RAM is right.

The guest (tests/helpers/guest.asm) continues to write as soon as the destination has its devices, so it needs pages at
once. The cases are those of QEMU's own tests below postcopy/ (tests/qtest/migration/postcopy-tests.c).
"""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from tests.helpers.cutting import Cut, CutProxy
from tests.helpers.parking import parking
from tests.helpers.peers import peer_parameters, using_peer
from tests.helpers.postcopying import IntoMigfw, Move, OutOfMigfw, there_and_back
from tests.helpers.qemu import BASE, Guest, Qemu, assemble, needs_qemu, wait_until
from tests.helpers.ram import allocated

pytestmark = [pytest.mark.qemu, needs_qemu]

PREEMPT = peer_parameters("7.2", "10.0", "newest")
"""The QEMUs that have a channel for requested pages."""


@pytest.mark.usefixtures("every_qemu")
def test_plain(guest: Guest) -> None:
    with there_and_back(guest) as moves:
        for move in moves:
            move.complete()


@pytest.mark.parametrize("label", peer_parameters("10.0", "newest"))  # an older QEMU starts it anew
def test_suspend(label: str, tmp_path: Path) -> None:
    """A guest that is suspended to RAM stays suspended, and needs no page."""
    guest = assemble(tmp_path, suspend=True)
    with (
        using_peer(label),
        Qemu(boot=guest.image) as source,
        parking() as engine,
        Qemu(boot=guest.image, incoming="defer") as destination,
    ):
        wait_until(lambda: source.command("query-status")["status"] == "suspended", "the guest to sleep")
        IntoMigfw(source, engine).complete()
        leaving = OutOfMigfw(destination, engine)
        leaving.begin(leaving.listen())
        leaving.hurry()
        leaving.completes()
        wait_until(lambda: destination.command("query-status")["status"] == "suspended", "the guest to sleep on")
        assert not destination.printed(), "it started anew"
        assert destination.memory(BASE, guest.end - BASE) == source.memory(BASE, guest.end - BASE)


@pytest.mark.parametrize("label", PREEMPT)
def test_preempt_plain(label: str, guest: Guest) -> None:
    with using_peer(label), there_and_back(guest, "postcopy-preempt") as moves:
        for move in moves:
            move.complete()


@pytest.mark.parametrize("label", peer_parameters("7.2", "newest"))
def test_release_ram(label: str, guest: Guest) -> None:
    """A QEMU also answers the PINGs that ask what has arrived."""
    with using_peer(label), there_and_back(guest, "release-ram") as (arriving, leaving):
        arriving.complete()
        leaving.begin(leaving.listen())
        leaving.both_reach("postcopy-active")
        blocks = leaving.engine.machine.ram_blocks()
        before = sum(map(allocated, blocks))
        leaving.engine.set_parameters({"max-postcopy-bandwidth": 8 << 20})
        assert wait_until(lambda: sum(map(allocated, blocks)) < before, "memory to be given back")
        leaving.hurry()
        leaving.completes()
        assert sum(map(allocated, blocks)) == 0


HUGE = (
    *("-object", "memory-backend-memfd,id=ram0,size=32M,hugetlb=on,hugetlbsize=2M,share=off"),
    *("-machine", "memory-backend=ram0"),
)


def _free_huge_pages() -> int:
    found = re.search(r"HugePages_Free: +(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) if found else 0


@pytest.mark.skipif(_free_huge_pages() < 32, reason="needs 32 huge pages of 2 MiB (sysctl vm.nr_hugepages=32)")
@pytest.mark.parametrize("label", peer_parameters("5.2", "newest"))
def test_huge_pages(label: str, tmp_path: Path) -> None:
    guest = assemble(tmp_path, pages=2048, delay=200)  # it writes to four huge pages
    with using_peer(label), there_and_back(guest, arguments=HUGE) as moves:
        for move in moves:
            move.complete()


# -- connections that break --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_qemu")
def test_recovery_plain(guest: Guest) -> None:
    with there_and_back(guest) as moves:
        for move in moves:
            breaks_twice(move)


@pytest.mark.parametrize("label", PREEMPT)
def test_preempt_recovery_plain(label: str, guest: Guest) -> None:
    with using_peer(label), there_and_back(guest, "postcopy-preempt") as moves:
        for move in moves:
            breaks_twice(move)


def breaks_twice(move: Move) -> None:
    with CutProxy(move.listen()) as proxy:
        move.begin(proxy.uri)
        for how in (Cut.RESET, Cut.END):
            move.both_reach("postcopy-active")
            assert wait_until(proxy.has_passed(1 << 18), "pages")
            proxy.cut_all(how)
            move.both_reach("postcopy-paused")
            proxy.lead_to(move.listen_again())
            move.resume(proxy.uri)
        move.both_reach("postcopy-active")
        move.finish()


@pytest.mark.parametrize("label", peer_parameters("10.0", "newest"))  # older QEMUs do not come back from this
def test_recovery_double_failures(label: str, guest: Guest) -> None:
    with using_peer(label), there_and_back(guest) as moves:
        for move in moves:
            with CutProxy(move.listen()) as proxy:
                move.begin(proxy.uri)
                move.both_reach("postcopy-active")
                proxy.cut(Cut.RESET)
                move.both_reach("postcopy-paused")
                handshake_fails(move)
                reconnect_fails(move)
                proxy.lead_to(move.listen_again())
                move.resume(proxy.uri)
                move.both_reach("postcopy-active")
                move.finish()


def handshake_fails(move: Move) -> None:
    """Each side connects to a stranger that does not answer."""
    source, far = socket.socketpair()
    destination, from_far = socket.socketpair()
    with far, from_far:
        from_far.sendall(b"\x08")  # QEMU notices a connection only when something comes over it
        move.listen_at(destination)
        move.resume_over(source)
        move.both_reach("postcopy-recover")
        move.pause()
        move.both_reach("postcopy-paused")


def reconnect_fails(move: Move) -> None:
    """The source's connection is closed at once."""
    source, far = socket.socketpair()
    far.close()
    move.resume_over(source)
    move.await_failure()
