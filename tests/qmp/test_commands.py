"""The commands on a real engine, and their page in the documentation."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.qmp.client import QmpClient, QmpError
from corefw.qmp.commands import CORE, Command, command_table
from corefw.qmp.server import QmpServer
from corefw.settings import CAPABILITIES, PARAMETERS
from tests.qmp.support import TinyMachine

PAGE = (Path(__file__).parents[2] / "docs" / "qmp.md").read_text()
SURFACE = """
    query-qmp-schema query-events human-monitor-command query-uuid query-kvm query-target query-machines
    query-current-machine query-memory-size-summary query-block query-named-block-nodes
    query-block-jobs query-jobs query-cpus-fast query-iothreads query-chardev query-memory-devices query-pci query-mice
    query-rx-filter query-tpm query-fdsets
    block-dirty-bitmap-add block-dirty-bitmap-remove block-dirty-bitmap-clear block-dirty-bitmap-enable
    block-dirty-bitmap-disable block-dirty-bitmap-merge transaction
    x-debug-block-dirty-bitmap-sha256 x-migfw-dirty-ranges
    migrate migrate-incoming migrate_cancel migrate-continue migrate-start-postcopy migrate-set-capabilities
    query-migrate-capabilities migrate-set-parameters query-migrate-parameters query-migrate migrate_set_speed
    migrate_set_downtime migrate-set-cache-size query-migrate-cache-size migrate-recover migrate-pause
    query-status stop cont quit getfd closefd query-version query-commands query-name qmp_capabilities
    x-migfw-status x-migfw-check x-migfw-verify x-migfw-transport
"""


@pytest.fixture
def client(server: QmpServer) -> Iterator[QmpClient]:
    with QmpClient(server.address) as client:
        yield client


def refused(client: QmpClient, command: str, **arguments: object) -> str:
    with pytest.raises(QmpError) as caught:
        client.execute(command, arguments)
    return caught.value.desc


def test_the_surface_is_complete(client: QmpClient) -> None:
    assert set(CORE) == set(SURFACE.split())
    assert [entry["name"] for entry in client.execute("query-commands")] == sorted(CORE)


# -- the page ----------------------------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    sections = re.split(r"^### `([^`]+)`.*$", PAGE, flags=re.MULTILINE)
    return {name: text.split("\n## ")[0] for name, text in zip(sections[1::2], sections[2::2], strict=True)}


def described(command: Command) -> list[tuple[str, str, bool]]:
    return [(one.name, one.shape.text, one.optional) for one in command.signature.parameters]


def test_every_command_is_on_the_page_with_its_arguments(engine: Engine) -> None:
    table = command_table(engine)
    pages = documented()
    assert pages.keys() == table.keys()
    for name, command in table.items():
        lines = re.findall(r"^- `([^`]+)`: (.+?)(, optional)?\.", pages[name], flags=re.MULTILINE)
        assert [(one, text.replace("`", ""), bool(optional)) for one, text, optional in lines] == described(command), (
            name
        )
        assert ("Out of band" in pages[name]) == command.out_of_band, name
        assert re.search(r"^Returns ", pages[name], flags=re.MULTILINE), name
        assert command.help, name


def test_the_pages_example_of_the_status_is_what_comes(client: QmpClient) -> None:
    def keys(value: object) -> object:
        return {name: keys(inner) for name, inner in value.items()} if isinstance(value, dict) else type(value)

    (example,) = re.findall(r"```json\n(.*?)```", documented()["x-migfw-status"], flags=re.DOTALL)
    found, shown = client.execute("x-migfw-status"), json.loads(example)
    for inner in (found["settings"], shown["settings"]):
        for group in inner.values():
            group.clear()
    assert keys({**found, "migration": {}, "incoming-uri": ""}) == keys({**shown, "migration": {}, "incoming-uri": ""})


# -- what they do ------------------------------------------------------------------------------------------------------


def test_status(client: QmpClient, engine: Engine) -> None:
    status = client.execute("x-migfw-status")
    assert status["pid"] == os.getpid()
    assert status["machine"] == {"kind": "tiny", "name": "tiny-1.0", "information": {"ram": {}}}
    assert (status["running"], status["status"]) == (False, "prelaunch")
    assert (status["outgoing"], status["incoming"], status["incoming-uri"]) == ("none", "none", None)
    assert status["settings"]["parameters"] == json.loads(json.dumps(engine.settings.parameters()))


def test_verify(client: QmpClient, engine: Engine) -> None:
    assert client.execute("x-migfw-verify") == {"writes": 7}
    assert isinstance(engine.machine, TinyMachine)
    engine.machine.broken = "2 writes were lost"
    assert refused(client, "x-migfw-verify") == "2 writes were lost"


def test_an_engine_without_a_name(client: QmpClient, plugins: object, engine: Engine, folder: Path) -> None:
    assert client.execute("query-name") == {"name": "tiny"}
    nameless = Engine(TinyMachine(), engine.plugins, engine.settings)
    with QmpServer(nameless, f"unix:{folder}/nameless") as server, QmpClient(server.address) as other:
        assert other.execute("query-name") == {}
    nameless.close()


def test_capabilities(client: QmpClient) -> None:
    def states() -> dict[str, bool]:
        return {one["capability"]: one["state"] for one in client.execute("query-migrate-capabilities")}

    def change(**states: bool) -> None:
        changes = [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]
        client.execute("migrate-set-capabilities", {"capabilities": changes})

    assert states() == {one.name: False for one in CAPABILITIES}
    change(events=True, return_path=True)
    assert [name for name, state in states().items() if state] == ["events", "return-path"]
    with pytest.raises(QmpError, match="'x-colo' is not supported by any installed plugin"):
        change(events=False, x_colo=True)
    with pytest.raises(QmpError, match="unknown capability 'foo'"):
        change(events=False, foo=True)
    assert states()["events"]
    change(x_multifd=False)


def test_parameters(client: QmpClient) -> None:
    values = client.execute("query-migrate-parameters")
    assert values == json.loads(json.dumps({one.name: one.default for one in PARAMETERS if one.default is not None}))
    client.execute("migrate-set-parameters", {"max-bandwidth": 1000, "tls-creds": None, "x-multifd-channels": 2})
    assert client.execute("query-migrate-parameters") == values | {"max-bandwidth": 1000}
    assert "'max-bandwidth' expects an integer" in refused(client, "migrate-set-parameters", **{"max-bandwidth": "x"})
    wrong = {"max-bandwidth": 1, "downtime-limit": 2_000_001}
    assert "'downtime-limit' expects" in refused(client, "migrate-set-parameters", **wrong)
    assert refused(client, "migrate-set-parameters", nonsense=1) == "Parameter 'nonsense' is unexpected"
    assert client.execute("query-migrate-parameters")["max-bandwidth"] == 1000


def test_the_seeds_older_setters(client: QmpClient) -> None:
    def parameter(name: str) -> object:
        return client.execute("query-migrate-parameters")[name]

    client.execute("migrate_set_speed", {"value": 5_000_000})
    assert parameter("max-bandwidth") == 5_000_000
    for seconds, milliseconds in ((0.3, 300), (1.001, 1001), (2000, 2_000_000), (0, 0)):
        client.execute("migrate_set_downtime", {"value": seconds})
        assert parameter("downtime-limit") == milliseconds
    for seconds in (-0.1, 2000.1):
        assert refused(client, "migrate_set_downtime", value=seconds) == (
            "Parameter 'downtime_limit' expects an integer in the range of 0 to 2000 seconds"
        )
    assert client.execute("query-migrate-cache-size") == 64 << 20
    client.execute("migrate-set-cache-size", {"value": 64 << 20})
    assert "power of two" in refused(client, "migrate-set-cache-size", value=5000)


def test_what_the_state_refuses(client: QmpClient) -> None:
    assert refused(client, "migrate-continue", state="pre-switchover") == "Migration not in expected state: none"
    assert refused(client, "migrate", uri="tcp:h:1", resume=True) == "Cannot resume if there is no paused migration"
    for storage in ("blk", "inc"):
        assert "'block'" in refused(client, "migrate", uri="tcp:h:1", **{storage: True})
    assert "no installed plugin has the scheme 'nope'" in refused(client, "migrate", uri="nope:x")
    assert "is not a migration URI" in refused(client, "migrate", uri="nope")
    assert client.execute("migrate_cancel") == {}
    assert client.execute("query-migrate") == {}


def test_the_pages_program_runs(engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    with QmpServer(engine, f"unix:{folder}/demo.qmp"):
        exec(program.replace("/run/", f"{folder}/"), {})
    engine.close()  # it logs how the migration ended, before stderr is closed
    assert capsys.readouterr().out.splitlines() == [
        "RESUME {}",
        "MIGRATION {'status': 'setup'}",
        "MIGRATION {'status': 'failing'}",
        "MIGRATION {'status': 'failed'}",
    ]
