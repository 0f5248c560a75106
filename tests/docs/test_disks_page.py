"""docs/disks.md: its program moves and finds its disk at the destination, and its backups miss no write."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corefw.engine import Engine
from corefw.machine import MachineConfig
from corefw.plugins import Plugins
from corefw.qmp.client import QmpClient
from corefw.qmp.server import QmpServer
from corefw.states import MigrationStatus
from corefw.testing.tasks import wait_until

PAGE = Path(__file__).parents[2] / "docs" / "disks.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def engine(program: Path, image: Path, *, incoming: bool) -> Engine:
    plugins = Plugins.load()
    machine = plugins.machine("python", MachineConfig(f"{program}:Ledger", {"image": str(image)}, incoming))
    return Engine(machine, plugins, plugins.settings())


def records(engine: Engine) -> int:
    return int(str(engine.verify()["records"]))


def wait_for_more(engine: Engine, least: int) -> None:
    before = records(engine)
    assert wait_until(lambda: records(engine) >= before + least)


def backup_of_the_page() -> Callable[..., None]:
    namespace: dict[str, Any] = {}
    exec(compile(blocks()[1], str(PAGE), "exec", dont_inherit=True), namespace)
    back_up: Callable[..., None] = namespace["back_up"]
    return back_up


def test_the_backup_misses_nothing_and_the_program_moves(tmp_path: Path) -> None:
    program, image, copy = tmp_path / "ledger.py", tmp_path / "ledger.raw", tmp_path / "copy.raw"
    program.write_text(blocks()[0])
    back_up = backup_of_the_page()
    with (
        contextlib.closing(engine(program, image, incoming=False)) as source,
        contextlib.closing(engine(program, image, incoming=True)) as destination,
    ):
        with QmpServer(source, f"unix:{tmp_path}/qmp") as server, QmpClient(server.address) as client:
            client.execute("block-dirty-bitmap-add", {"node": "ledger", "name": "0", "granularity": 4096})
            client.execute("cont")
            wait_for_more(source, 100)
            shutil.copy(image, copy)
            for day in range(5):
                wait_for_more(source, 300)
                back_up(client, "ledger", image, copy, str(day), str(day + 1))
            client.execute("stop")
            back_up(client, "ledger", image, copy, "5", "6")
            assert copy.read_bytes() == image.read_bytes()
            client.execute("cont")
            source.set_capabilities({"dirty-bitmaps": True, "return-path": True})
            source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
            assert destination.wait_incoming(60) is MigrationStatus.COMPLETED
        with QmpServer(destination, f"unix:{tmp_path}/there") as server, QmpClient(server.address) as client:
            wait_for_more(destination, 300)
            client.execute("stop")
            back_up(client, "ledger", image, copy, "6", "7")
            assert copy.read_bytes() == image.read_bytes()
