"""A real QEMU's machine moves in postcopy, into a migfw that parks it and out of one: every byte of its RAM is right.

The guest (tests/helpers/guest.asm) goes on with its writes as soon as the destination has its devices, so it needs
pages at once; a limit on the bandwidth makes sure that it needs them before they come by themselves.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.machine import RunState
from corefw.states import MigrationStatus
from tests.helpers.engines import query_migrate
from tests.helpers.parking import PATIENCE, parking, prove, wait_parked, wait_status
from tests.helpers.qemu import Guest, Qemu, needs_qemu, wait_until

pytestmark = [pytest.mark.qemu, needs_qemu, pytest.mark.timeout(120)]

SLOW = 4 << 20
"""Bytes per second: the guest's 15 MiB take seconds."""


def park_in_postcopy(source: Qemu, engine: Engine, uri: str) -> None:
    """Have QEMU switch to postcopy at once, and finish."""
    source.capabilities("postcopy-ram")
    source.command("migrate-set-parameters", max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
    source.command("migrate", uri=engine.migrate_incoming(uri))
    source.command("migrate-start-postcopy")
    wait_status(engine, "postcopy-active", incoming=True)
    wait_until(lambda: engine.machine.run_state is RunState.PAUSED, "the guest to be the parked machine's")
    source.command("migrate-set-parameters", max_postcopy_bandwidth=0)


def wake_in_postcopy(engine: Engine, uri: str, destination: Qemu) -> None:
    """Send the machine to a QEMU that runs it before its RAM is there, and finish once it has asked for pages."""
    engine.set_parameters({"max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOW})
    engine.migrate(uri)
    engine.start_postcopy()
    wait_status(engine, "postcopy-active")
    destination.wait_running()
    wait_until(lambda: query_migrate(engine)["ram"]["postcopy-requests"] > 0, "a page request")
    engine.set_parameters({"max-postcopy-bandwidth": 0})
    assert engine.wait_outgoing(PATIENCE) is MigrationStatus.COMPLETED, query_migrate(engine)


@pytest.mark.usefixtures("every_qemu")
def test_in_and_out(guest: Guest, folder: Path) -> None:
    with (
        Qemu(boot=guest.image) as source,
        parking("postcopy-ram") as engine,
        Qemu(boot=guest.image, incoming="defer") as destination,
    ):
        source.wait_printed("B")
        park_in_postcopy(source, engine, "tcp:127.0.0.1:0")
        wait_parked(engine)
        source.wait_migrated()
        destination.capabilities("postcopy-ram")
        wake_in_postcopy(engine, destination.listen(), destination)
        prove(guest, destination)
