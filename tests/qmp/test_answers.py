"""Queries are answered as QEMU answers them, with at least its members and their JSON types.

Compared with each installed version when idle, after a failure, in pre-switchover, after a cancel and after completion.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from corefw.engine import Engine
from corefw.qmp.client import QmpClient
from corefw.qmp.commands import CORE
from corefw.qmp.server import QmpServer
from tests.helpers.engines import PATIENCE
from tests.helpers.peers import RELEASES, find_peer, peer_parameters
from tests.helpers.qemu import wait_until
from tests.qmp.conftest import is_listening

pytestmark = pytest.mark.qemu

SMALL: Final = ("-M", "pc", "-m", "16", "-nodefaults", "-display", "none", "-S")

ALLOWED: Final[Mapping[str, str]] = {
    "query-cpus-fast[]": "a guest here has no virtual CPUs to list",
    "query-chardev[]": "QEMU lists its monitor",
    "query-mice[]": "a guest here has no mouse",
    "query-pci[]": "a guest here has no PCI bus",
    "query-machines[].default-ram-id": "RAM blocks have no default name here",
    "query-machines[].default-cpu-type": "a guest here has no virtual CPUs",
    "cancelled: query-migrate.error-desc": "QEMU 10 has one where pre-switchover was cancelled, but not in active",
}
"""Where our answer lacks something, and why."""

QUERIES: Final = sorted(name for name in CORE if name.startswith("query-") and name != "query-qmp-schema")
"""The schema's types and names differ by design; test_introspection.py tests it."""

Answers = dict[str, dict[str, Any]]


@pytest.fixture
def theirs(request: pytest.FixtureRequest, folder: Path) -> Iterator[QmpClient]:
    peer = find_peer(request.param)
    assert peer is not None
    path = folder / "theirs"
    process = subprocess.Popen(
        [*peer.command, *SMALL, "-qmp", f"unix:{path},server=on,wait=off"],
        env={**os.environ, **peer.environment},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: process.poll() is not None or is_listening(path), "QEMU's QMP socket")
        with QmpClient(f"unix:{path}") as client:
            yield client
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def ours(engine: Engine, folder: Path) -> Iterator[QmpClient]:
    with QmpServer(engine, f"unix:{folder}/ours") as server, QmpClient(server.address) as client:
        yield client


def in_every_situation(client: QmpClient) -> Answers:
    """situation -> query -> answer."""
    known = {entry["name"] for entry in client.execute("query-commands")}
    found: Answers = {}

    def ask(situation: str) -> None:
        found[situation] = {name: client.execute(name) for name in QUERIES if name in known}

    def reach(status: str) -> None:
        wait_until(lambda: client.execute("query-migrate").get("status") == status, status)

    ask("idle")
    client.execute("migrate", {"uri": "unix:/nowhere/at/all"})
    reach("failed")
    ask("failed")
    pause = {"capability": "pause-before-switchover", "state": True}
    client.execute("migrate-set-capabilities", {"capabilities": [pause]})
    client.execute("cont")
    client.execute("migrate", {"uri": "exec:cat >/dev/null"})
    reach("pre-switchover")
    ask("pre-switchover")
    client.execute("migrate_cancel")
    reach("cancelled")
    ask("cancelled")
    client.execute("migrate", {"uri": "exec:cat >/dev/null"})
    reach("pre-switchover")
    client.execute("migrate-continue", {"state": "pre-switchover"})
    reach("completed")
    ask("completed")
    return found


def lacking(ours: Any, theirs: Any, path: str) -> list[str]:
    """The places where our answer lacks something of theirs."""
    if kind(ours) != kind(theirs):
        return [f"{path}: {kind(ours)}, expected {kind(theirs)}"]
    if isinstance(theirs, dict):
        missing = [f"{path}.{name}" for name in theirs if name not in ours]
        pairs = [(ours[name], theirs[name], f"{path}.{name}") for name in theirs if name in ours]
        return missing + [one for pair in pairs for one in lacking(*pair)]
    if isinstance(theirs, list) and theirs:
        if not ours:
            return [f"{path}[]"]
        return [one for item in ours for one in lacking(item, common(theirs), f"{path}[]")]
    return []


def common(items: list[Any]) -> Any:
    """The members that all items of a list have."""
    if not isinstance(items[0], dict):
        return items[0]
    return {name: value for name, value in items[0].items() if all(name in item for item in items)}


def kind(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return type(value).__name__


@pytest.mark.parametrize("theirs", peer_parameters(*RELEASES), indirect=True)
def test_answers_have_what_qemus_have(ours: QmpClient, theirs: QmpClient) -> None:
    mine, qemus = in_every_situation(ours), in_every_situation(theirs)
    assert len(qemus["idle"]) > 20
    found = {
        f"{situation}: {place}"
        for situation, answers in qemus.items()
        for name, answer in answers.items()
        for place in lacking(mine[situation][name], answer, name)
        if place not in ALLOWED and f"{situation}: {place}" not in ALLOWED
    }
    assert found == set()
    for situation in ("idle", "cancelled", "failed", "completed"):
        mine_only = mine[situation]["query-migrate"].keys() - qemus[situation]["query-migrate"].keys()
        assert mine_only <= {"x-migfw"}, situation
    assert capabilities(mine) >= capabilities(qemus)


def capabilities(answers: Answers) -> set[str]:
    return {one["capability"] for one in answers["idle"]["query-migrate-capabilities"]}


def test_events_come_in_qemus_order(ours: QmpClient) -> None:
    """QEMU 10.0 and 11.1 send STOP before device, and failing before failed."""

    def happened(uri: str) -> list[str]:
        client = ours
        client.execute("migrate", {"uri": uri})
        names: list[str] = []
        while not names or names[-1] not in ("failed", "completed"):
            event = client.wait_event(PATIENCE)
            assert event is not None, names
            if event.name != "MIGRATION_PASS":
                names.append(str(event.data.get("status", event.name)))
        return names

    ours.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    ours.execute("cont")
    resumed = ours.wait_event(PATIENCE)
    assert resumed is not None
    assert resumed.name == "RESUME"
    assert happened("unix:/nowhere/at/all") == ["setup", "failing", "failed"]
    assert happened("exec:cat >/dev/null") == ["setup", "active", "STOP", "device", "completed"]
