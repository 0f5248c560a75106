"""Slow sources: silence does not end a stream, unless it lasts too long."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from corefw_machine_qemu import adopting

from corefw.engine import Engine, connection
from corefw.machine import MachineConfig, ParkingMachine
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from tests.helpers.engines import PATIENCE, Pair, arrived

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_source_that_trickles_does_not_keep_a_failure_from_ending(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "DRAIN_SECONDS", 0.3)
    destination = pair.destination()
    port = int(destination.migrate_incoming("tcp:127.0.0.1:0").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as source:
        source.sendall(b"QEVM and nonsense")
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(ConnectionError):
            while destination.incoming.status is not MigrationStatus.FAILED:
                assert time.monotonic() < deadline, "the destination listens to nonsense"
                source.sendall(b"x")
                time.sleep(0.05)
    assert arrived(destination) == "failed"


@pytest.fixture
def parking(plugins: Plugins) -> Iterator[Engine]:
    machine = plugins.machine("qemu", MachineConfig(incoming=True))
    with contextlib.closing(Engine(machine, plugins, plugins.settings())) as engine:
        yield engine


def test_silence_on_a_one_way_stream_is_not_its_end(
    parking: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a description and footers, the bytes do not show whether the device state is complete. But a source that
    gets no answer closes its stream."""
    monkeypatch.setattr(adopting, "QUIET_WITHOUT", 0.05)
    stream = gzip.decompress((GOLDEN / "pc-bare.gz").read_bytes())
    cut = stream.rindex(b"\0\0\0\0", 0, -100) + 4
    os.mkfifo(folder / "way")
    parking.migrate_incoming(f"file:{folder}/way")
    with (folder / "way").open("wb", buffering=0) as way:
        way.write(stream[:cut])
        assert not parking.incoming.wait(frozenset({MigrationStatus.COMPLETED, MigrationStatus.FAILED}), 0.5)
        way.write(stream[cut:])
    assert arrived(parking) == "completed"
    assert isinstance(parking.machine, ParkingMachine)
    machine = parking.machine
    assert stream.endswith(b"".join(machine.stored_sections()) + machine.stored_end())
