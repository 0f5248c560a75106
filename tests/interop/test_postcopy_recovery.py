"""The connection of a postcopy between a real QEMU and migfw breaks, and another one takes its place.

Sources and destinations are both: a QEMU whose machine is parked here, and a parked machine that wakes up in a QEMU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.states import MigrationStatus
from tests.helpers.cutting import Cut, CutProxy
from tests.helpers.engines import query_migrate
from tests.helpers.parking import PATIENCE, park, parking, prove, send, wait_parked, wait_status
from tests.helpers.qemu import Guest, Qemu, needs_qemu, wait_until

pytestmark = [pytest.mark.qemu, needs_qemu, pytest.mark.timeout(120), pytest.mark.usefixtures("every_qemu")]

LISTEN = "tcp:127.0.0.1:0"
SLOW = 1 << 20


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

    def finish(self) -> None:
        self.engine.set_parameters({"max-postcopy-bandwidth": 0})
        assert self.engine.wait_outgoing(PATIENCE) is MigrationStatus.COMPLETED, query_migrate(self.engine)


@contextlib.contextmanager
def moving(way: str, guest: Guest, folder: Path) -> Iterator[Parked | Waking]:
    """Ready to begin. Behind the block, the guest has to go on in a QEMU."""
    with (
        Qemu(boot=guest.image, out_of_band=True) as source,
        parking() as engine,
        Qemu(boot=guest.image, incoming="defer", out_of_band=True) as destination,
    ):
        source.wait_printed("B")
        if way == "into migfw":
            yield Parked(source, engine)
            send(engine, destination.listen())
        else:
            park(source, engine, f"unix:{folder}/in")
            yield Waking(engine, destination)
        prove(guest, destination)


BOTH_WAYS = pytest.mark.parametrize("way", ["into migfw", "out of migfw"])


@BOTH_WAYS
def test_a_connection_that_is_cut_twice(way: str, guest: Guest, folder: Path) -> None:
    with moving(way, guest, folder) as move, CutProxy(move.listen()) as proxy:
        move.begin(proxy.uri)
        for how in (Cut.RESET, Cut.END):
            move.both_reach("postcopy-active")
            assert wait_until(proxy.has_passed(1 << 19), "pages")
            proxy.cut(how)
            move.both_reach("postcopy-paused")
            proxy.lead_to(move.listen_again())
            move.resume(proxy.uri)
        move.both_reach("postcopy-active")
        move.finish()
