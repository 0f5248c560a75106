"""The connection of a postcopy between a real QEMU and migfw breaks, and another one takes its place.

Sources and destinations are both: a QEMU whose machine is parked here, and a parked machine that wakes up in a QEMU.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from corefw.engine import Engine
from corefw.net import descriptors
from corefw.states import MigrationStatus
from tests.helpers.cutting import Cut, CutProxy
from tests.helpers.engines import query_migrate
from tests.helpers.parking import PATIENCE, parking, prove, wait_parked, wait_status
from tests.helpers.peers import peer_parameters, using_peer
from tests.helpers.qemu import Guest, Qemu, needs_qemu, wait_until

pytestmark = [pytest.mark.qemu, needs_qemu, pytest.mark.timeout(120)]

LISTEN = "tcp:127.0.0.1:0"
SLOW = 4 << 20


class Parked:
    """A QEMU's machine that is being parked in postcopy."""

    def __init__(self, source: Qemu, engine: Engine) -> None:
        self.source, self.engine = source, engine

    def begin(self, uri: str) -> None:
        self.source.capabilities("postcopy-ram")
        self.source.command("migrate-set-parameters", max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
        self.source.command("migrate", uri=uri)
        self.source.command("migrate-start-postcopy")

    def listen(self) -> str:
        return self.engine.migrate_incoming(LISTEN)

    def both_reach(self, status: str) -> None:
        wait_until(lambda: self.source.status() == status, f"QEMU to be {status}")
        wait_status(self.engine, status, incoming=True)

    def listen_again(self) -> str:
        return self.engine.recover(LISTEN)

    def resume(self, uri: str) -> None:
        self.source.command("migrate", uri=uri, resume=True)

    def listen_at(self, stranger: socket.socket) -> None:
        descriptors.put("stranger", stranger.detach())
        self.engine.recover("fd:stranger")

    def resume_over(self, stranger: socket.socket) -> None:
        self.source.command("getfd", fdname="stranger", fd=stranger.fileno())
        stranger.close()
        self.resume("fd:stranger")  # when this returns, the status is another one

    def await_failure(self) -> None:
        self.both_reach("postcopy-paused")

    def pause(self) -> None:
        self.source.urgent("migrate-pause")
        self.engine.pause_migration()

    def finish(self) -> None:
        self.source.command("migrate-set-parameters", max_postcopy_bandwidth=0)
        wait_parked(self.engine)
        self.source.wait_migrated()


class Waking:
    """A parked machine that is waking up in a QEMU, in postcopy."""

    def __init__(self, engine: Engine, destination: Qemu) -> None:
        self.engine, self.destination = engine, destination

    def begin(self, uri: str) -> None:
        self.engine.set_capabilities({"postcopy-ram": True})
        self.engine.set_parameters({"max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOW})
        self.engine.migrate(uri)
        self.engine.start_postcopy()

    def listen(self) -> str:
        self.destination.capabilities("postcopy-ram")
        return self.destination.listen()

    def both_reach(self, status: str) -> None:
        wait_status(self.engine, status)
        wait_until(lambda: self.destination.status() == status, f"QEMU to be {status}")

    def listen_again(self) -> str:
        return self.destination.listen_again()

    def resume(self, uri: str) -> None:
        self.engine.migrate(uri, resume=True)

    def listen_at(self, stranger: socket.socket) -> None:
        self.destination.command("getfd", fdname="stranger", fd=stranger.fileno())
        stranger.close()
        self.destination.urgent("migrate-recover", uri="fd:stranger")

    def resume_over(self, stranger: socket.socket) -> None:
        descriptors.put("stranger", stranger.detach())
        self.resume("fd:stranger")

    def await_failure(self) -> None:
        wait_until(lambda: "fd:stranger" in (self.engine.report().error or ""), "the resume to fail")
        self.both_reach("postcopy-paused")

    def pause(self) -> None:
        self.engine.pause_migration()
        self.destination.urgent("migrate-pause")

    def finish(self) -> None:
        self.engine.set_parameters({"max-postcopy-bandwidth": 0})
        assert self.engine.wait_outgoing(PATIENCE) is MigrationStatus.COMPLETED, query_migrate(self.engine)


@contextlib.contextmanager
def two_moves(guest: Guest) -> Iterator[tuple[Parked, Waking]]:
    """From QEMU into migfw, and from there into another QEMU, where the guest has to go on behind the block."""
    with (
        Qemu(boot=guest.image, out_of_band=True) as source,
        parking() as engine,
        Qemu(boot=guest.image, incoming="defer", out_of_band=True) as destination,
    ):
        source.wait_printed("B")
        yield Parked(source, engine), Waking(engine, destination)
        prove(guest, destination)


@pytest.mark.usefixtures("every_qemu")
def test_a_connection_that_is_cut_twice(guest: Guest) -> None:
    with two_moves(guest) as moves:
        for move in moves:
            with CutProxy(move.listen()) as proxy:
                move.begin(proxy.uri)
                for how in (Cut.RESET, Cut.END):
                    move.both_reach("postcopy-active")
                    assert wait_until(proxy.has_passed(1 << 18), "pages")
                    proxy.cut(how)
                    move.both_reach("postcopy-paused")
                    proxy.lead_to(move.listen_again())
                    move.resume(proxy.uri)
                move.both_reach("postcopy-active")
                move.finish()


@pytest.mark.parametrize("label", peer_parameters("10.0", "newest"))  # older QEMUs do not come back from this
def test_recoveries_that_fail(label: str, guest: Guest) -> None:
    """QEMU's tests recovery/double-failures/handshake and /reconnect of postcopy: first each side talks to a stranger
    who says nothing, then the source's connection is closed at once."""
    with using_peer(label), two_moves(guest) as moves:
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


def handshake_fails(move: Parked | Waking) -> None:
    source, far = socket.socketpair()
    destination, from_far = socket.socketpair()
    with far, from_far:
        from_far.sendall(b"\x08")  # QEMU notices a connection only when something comes over it
        move.listen_at(destination)
        move.resume_over(source)
        move.both_reach("postcopy-recover")
        move.pause()
        move.both_reach("postcopy-paused")


def reconnect_fails(move: Parked | Waking) -> None:
    source, far = socket.socketpair()
    far.close()
    move.resume_over(source)
    move.await_failure()
