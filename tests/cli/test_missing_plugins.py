"""If a plugin is missing or broken, migfw refuses to migrate and keeps the guest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL, Engines
from tests.helpers.cli import migfw
from tests.helpers.installs import install


@pytest.mark.parametrize(("plugin", "broken"), [("ram", False), ("devices", True)], ids=["absent", "broken"])
def test_nothing_is_sent_without_a_plugin(
    engines: Engines, plugin: str, broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = f"{plugin}_that_breaks"
    site = install(
        tmp_path / "site",
        f"migfw-{plugin}",
        plugins={plugin: module} if broken else {},
        modules={module: "raise ImportError('no libfoo')"},
    )
    complaint = f"plugin '{plugin}' ({module}) failed to load: ImportError: no libfoo" if broken else f"migfw-{plugin}"
    whole = engines(*SMALL, "--incoming=tcp:127.0.0.1:0")
    monkeypatch.setenv("PYTHONPATH", str(site))
    source = engines(*SMALL)
    for uri in (f"file:{tmp_path}/guest", whole.uri):
        done = source.call("migrate", uri)
        assert done.returncode == 2, done
        assert complaint in done.stderr, done
        assert "no plugin carries" in done.stderr, done
    assert not (tmp_path / "guest").exists()
    status = source.call("status", "--json")
    assert complaint in " ".join(json.loads(status.stdout)["migration"]["blocked-reasons"]), status
    assert source.ask("query-status")["running"] is True
    destination = migfw("run", *SMALL, "--incoming=tcp:127.0.0.1:0", runtime=engines.runtime)
    assert destination.returncode == 2, destination
    assert "no plugin carries" in destination.stderr, destination
    only = migfw("run", *SMALL, "--only-migratable", runtime=engines.runtime)
    assert only.returncode == 2, only
    assert complaint in only.stderr, only
    monkeypatch.delenv("PYTHONPATH")
    assert engines(*SMALL).call("migrate", whole.uri).returncode == 0, "the destination still waits for a whole guest"
