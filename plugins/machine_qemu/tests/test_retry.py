"""After a failed stream, a parked machine accepts any other guest."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.machine import MachineConfig
from corefw.plugins import Plugins
from tests.helpers.engines import query_migrate

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"


@pytest.fixture
def engine() -> Iterator[Engine]:
    plugins = Plugins.load()
    machine = plugins.machine("qemu", MachineConfig(incoming=True))
    with closing(Engine(machine, plugins, plugins.settings())) as engine:
        yield engine


def test_another_guest_after_a_stream_that_was_cut(engine: Engine, tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.write_bytes(gzip.decompress((GOLDEN / "pc.gz").read_bytes())[:-100])
    whole.write_bytes(gzip.decompress((GOLDEN / "microvm.gz").read_bytes()))
    engine.migrate_incoming(f"file:{cut}")
    assert engine.wait_incoming(60) == "failed"
    assert not engine.machine.ram_blocks(), "a failed load keeps nothing"
    engine.migrate_incoming(f"file:{whole}")
    assert engine.wait_incoming(60) == "completed", query_migrate(engine)
    assert {block.idstr for block in engine.machine.ram_blocks()} != {"pc.ram"}
