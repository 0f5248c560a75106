"""`migfw plugins`: what is installed, and what is wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.cli import TIMEOUT, migfw

METADATA = "Metadata-Version: 2.1\nName: broken-plugin\nVersion: 9.9\n"


def test_the_table_and_the_document_say_the_same() -> None:
    table = migfw("plugins")
    document = json.loads(migfw("plugins", "--json").stdout)
    assert (table.returncode, table.stderr) == (0, "")
    rows = table.stdout.splitlines()[1:]
    assert len(rows) == len(document)
    assert {"group", "name", "target", "distribution", "version", "error"} <= document[0].keys()
    tcp = next(one for one in document if one["name"] == "tcp")
    assert (tcp["group"], tcp["distribution"], tcp["error"]) == ("corefw.transport", "migfw-transport-tcp", None)
    assert ["transport", "tcp", "migfw-transport-tcp", tcp["version"], "ok"] in [row.split() for row in rows]


def test_a_broken_plugin_is_named_and_takes_nobody_down(tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('half\\ninstalled')\n")
    info = tmp_path / "broken_plugin-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(
        "[corefw.plugins]\nbroken = broken_plugin\n\n[corefw.transport]\nbroken = broken_plugin:Transport\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "corefw.cli", "plugins"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    broken = [" ".join(line.split()) for line in done.stdout.splitlines() if "broken" in line]
    assert [line.partition(" failed: ")[0] for line in broken] == [
        "transport broken broken-plugin 9.9",
        "plugins broken broken-plugin 9.9",
    ]
    assert all(line.endswith("RuntimeError: half installed") for line in broken)
    assert " ok" in done.stdout
