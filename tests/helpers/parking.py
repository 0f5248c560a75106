"""Engines with a parked machine, for tests that move machines between QEMUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from corefw.engine import Engine
from corefw.machine import MachineConfig, RunState
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from tests.helpers.engines import query_migrate
from tests.helpers.qemu import Guest, Qemu, wait_until

PATIENCE = 60.0


@contextlib.contextmanager
def parking(*capabilities: str, **options: str) -> Iterator[Engine]:
    """An engine for a parked machine, with these capabilities on."""
    plugins = Plugins.load()
    machine = plugins.machine("qemu", MachineConfig(options=options, incoming=True))
    engine = Engine(machine, plugins, plugins.settings())
    engine.set_parameters({"max-bandwidth": 0})
    engine.set_capabilities(dict.fromkeys(capabilities, True))
    try:
        yield engine
    finally:
        engine.close()


def wait_parked(engine: Engine) -> None:
    status = engine.wait_incoming(PATIENCE)
    assert status is MigrationStatus.COMPLETED, query_migrate(engine)
    assert engine.machine.run_state is RunState.PAUSED


def wait_status(engine: Engine, status: str, *, incoming: bool = False) -> None:
    """Wait until the migration has this status."""
    machine = engine.incoming if incoming else engine.outgoing
    wait_until(lambda: machine.status == status, f"the {machine.side} to be {status}, not {machine.status}")


def send(engine: Engine, uri: str) -> None:
    engine.migrate(uri)
    status = engine.wait_outgoing(PATIENCE)
    assert status is MigrationStatus.COMPLETED, query_migrate(engine)


def park(source: Qemu, engine: Engine, uri: str) -> None:
    """Move the machine from QEMU into the engine over tcp or unix."""
    source.migrate(engine.migrate_incoming(uri))
    wait_parked(engine)
    source.wait_migrated()


def prove(guest: Guest, destination: Qemu) -> None:
    """Check that the guest continues at the destination and that its memory is correct."""
    destination.wait_running()
    destination.wait_printed("B", 2)
    assert set(destination.printed()) == {"B"}, "it booted instead of continuing"
    guest.check(destination)
