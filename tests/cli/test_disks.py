"""A program with a disk, with the commands of the page on disks and real engine processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from corefw.qmp.client import QmpClient
from corefw.testing.tasks import wait_until
from tests.cli.conftest import Engine, Engines

PAGE = Path(__file__).parents[2] / "docs" / "disks.md"


def bitmaps(engine: Engine) -> dict[str, dict[str, Any]]:
    (disk,) = engine.ask("query-block")
    return {one["name"]: one for one in disk["inserted"].get("dirty-bitmaps", ())}


def execute(engine: Engine, command: str, **arguments: object) -> Any:
    with QmpClient(engine.address) as client:
        return client.execute(command, {"node": "ledger", **arguments})


def test_a_disk_and_its_bitmaps_move(engines: Engines, tmp_path: Path) -> None:
    program = tmp_path / "ledger.py"
    program.write_text(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0])
    ledger = (f"{program}:Ledger", f"--opt=image={tmp_path / 'ledger.raw'}")
    early = engines(*ledger, "--name=to", "--incoming=tcp:127.0.0.1:0")
    status, _, error = early.finish()
    assert status == 2, error
    assert re.fullmatch(
        r"migfw: disk 'ledger': .*ledger\.raw: No such file or directory \(a destination needs the file too: shared"
        r" storage, or a copy\)\n",
        error,
    )

    source = engines(*ledger, "--name=from")
    destination = engines(*ledger, "--name=to", "--incoming=tcp:127.0.0.1:0")
    execute(source, "block-dirty-bitmap-add", name="monday", granularity=4096)
    assert wait_until(lambda: bitmaps(source)["monday"]["count"] > 0)
    execute(source, "block-dirty-bitmap-add", name="tuesday", disabled=True)
    merged = source.call("qmp", "block-dirty-bitmap-merge", "node=ledger", "target=tuesday", 'bitmaps=["monday"]')
    assert (merged.returncode, merged.stdout) == (0, "{}\n"), merged.stderr
    digest = execute(source, "x-debug-block-dirty-bitmap-sha256", name="tuesday")
    shown = source.call("status").stdout
    assert re.search(r"^disks: +ledger /.*/ledger\.raw$", shown, re.MULTILINE), shown
    assert re.search(r"^dirty bitmaps: +ledger/tuesday \d.*, ledger/monday \d", shown, re.MULTILINE), shown

    moved = source.call("migrate", destination.uri, "--cap=dirty-bitmaps")
    assert moved.returncode == 0, moved.stderr
    assert {name: one["recording"] for name, one in bitmaps(destination).items()} == {"monday": True, "tuesday": False}
    assert execute(destination, "x-debug-block-dirty-bitmap-sha256", name="tuesday") == digest
    execute(destination, "block-dirty-bitmap-clear", name="monday")
    assert wait_until(lambda: bitmaps(destination)["monday"]["count"] > 0)
    verified = destination.call("verify")
    assert verified.returncode == 0, verified.stderr
