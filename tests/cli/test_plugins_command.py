"""`migfw plugins`: what is installed, and what fails to load."""

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
    rows = [line for line in table.stdout.splitlines()[1:] if " adds " not in line]
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


EXTRA = """
from corefw.hookspecs import hookimpl
from corefw.declarations import Capability, Declarations, Kind, Parameter

@hookimpl
def corefw_settings():
    return Declarations(
        capabilities=(Capability("x-warp", "bend space"),),
        parameters=(Parameter("x-warp-factor", Kind.INTEGER, 5, "how much", maximum=9),),
        implements=frozenset({"x-warp", "x-warp-factor", "xbzrle"}),
    )

@hookimpl
def corefw_commands(control):
    return {}
"""


def with_extra(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run migfw with an extra plugin that adds settings, a command, a scheme and a machine."""
    (folder / "warp_plugin.py").write_text(EXTRA)
    info = folder / "warp_plugin-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: warp-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[corefw.plugins]\nwarp = warp_plugin\n\n"
        "[corefw.transport]\nwarp = nowhere:Transport\n\n[corefw.machine]\nship = nowhere:Machine\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "corefw.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )


def test_what_a_plugin_adds(tmp_path: Path) -> None:
    table = with_extra(tmp_path, "plugins").stdout
    assert "'warp' adds QMP commands, capability x-warp, parameter x-warp-factor, support of xbzrle\n" in table
    assert "'ram' adds section savers, section loaders" in table


def test_the_settings(tmp_path: Path) -> None:
    rows = [line.split(maxsplit=5) for line in with_extra(tmp_path, "plugins", "--settings").stdout.splitlines()]
    assert ["capability", "x-warp", "off", "yes", "warp", "bend space"] in rows
    assert ["parameter", "x-warp-factor", "5", "yes", "warp", "how much"] in rows
    assert next(row for row in rows if row[1] == "xbzrle")[3] == "yes"
    assert next(row for row in rows if row[1] == "multifd")[3] == "refused"
    assert next(row for row in rows if row[1] == "store-global-state")[0] == "property"
    document = json.loads(with_extra(tmp_path, "plugins", "--settings", "--json").stdout)
    assert {
        "kind": "parameter",
        "name": "x-warp-factor",
        "default": 5,
        "from": "warp",
        "supported": True,
        "help": "how much",
    } in document


def test_help_names_what_is_installed_and_imports_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "nowhere.py").write_text("raise SystemExit('imported')\n")
    for command in ("run", "migrate"):
        text = with_extra(tmp_path, command, "--help").stdout
        schemes = next(line for line in text.splitlines() if "URI schemes" in line)
        assert {"ssh", "tcp", "warp"} <= set(schemes.replace(",", " ").split())
        machines = next(line for line in text.splitlines() if line.strip().startswith("machines"))
        assert machines.split()[1:] == ["python,", "qemu,", "ship"]
