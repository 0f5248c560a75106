"""query-qmp-schema is complete and correct; the human monitor and the argument `channels` work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from corefw.engine import Engine
from corefw.plugins import Plugins
from corefw.qmp.client import QmpClient, QmpError
from corefw.qmp.commands import command_table
from corefw.qmp.documents import EVENTS
from corefw.qmp.server import QmpServer
from tests.helpers.engines import PATIENCE
from tests.qmp.support import TinyMachine


@pytest.fixture
def client(server: QmpServer) -> Iterator[QmpClient]:
    with QmpClient(server.address) as client:
        yield client


@pytest.fixture
def schema(client: QmpClient) -> dict[str, dict[str, Any]]:
    entries = client.execute("query-qmp-schema")
    found = {entry["name"]: entry for entry in entries}
    assert len(found) == len(entries), "a name belongs to one entry"
    return found


def members(schema: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    return {one["name"]: schema[one["type"]] for one in schema[name]["members"]}


def references(entry: Mapping[str, Any]) -> set[str]:
    inner = [*entry.get("members", ()), *entry.get("variants", ())]
    named = {entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry}
    return named | {one["type"] for one in inner if "type" in one}


def test_every_command_and_event_is_there_and_every_type_is_explained(
    client: QmpClient, schema: dict[str, dict[str, Any]]
) -> None:
    commands = {name for name, entry in schema.items() if entry["meta-type"] == "command"}
    assert commands == {entry["name"] for entry in client.execute("query-commands")}
    assert {name for name, entry in schema.items() if entry["meta-type"] == "event"} == set(EVENTS)
    assert list(EVENTS) == [entry["name"] for entry in client.execute("query-events")]
    for entry in schema.values():
        assert references(entry) <= schema.keys(), entry
    assert schema["migrate-pause"]["allow-oob"]
    assert "allow-oob" not in schema["migrate"]


def test_arguments_are_described(schema: dict[str, dict[str, Any]], engine: Engine) -> None:
    migrate = schema[schema["migrate"]["arg-type"]]["members"]
    assert all("default" in one for one in migrate), "all of them are optional"
    channel = schema[members(schema, schema["migrate"]["arg-type"])["channels"]["element-type"]]
    address = members(schema, channel["name"])["addr"]
    assert (address["tag"], [one["case"] for one in address["variants"]]) == (
        "transport",
        ["socket", "exec", "rdma", "file"],
    )
    changes = members(schema, schema["migrate-set-parameters"]["arg-type"])
    assert changes.keys() >= engine.settings.parameters().keys() | {"x-multifd-channels"}
    assert changes["tls-creds"]["meta-type"] == "alternate"
    assert changes["max-bandwidth"] == {"name": "int", "meta-type": "builtin", "json-type": "int"}
    capabilities = members(schema, schema["migrate-set-capabilities"]["arg-type"])["capabilities"]
    names = members(schema, capabilities["element-type"])["capability"]
    assert names["values"] == list(engine.settings.capabilities())


@pytest.mark.parametrize("situation", ["idle", "failed"])
def test_every_query_returns_what_the_schema_says(client: QmpClient, engine: Engine, situation: str) -> None:
    if situation == "failed":
        client.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
        assert engine.wait_outgoing(PATIENCE) == "failed"
    asked = 0
    for name, command in command_table(engine).items():
        if name.startswith("query-") or name == "x-migfw-status":
            command.signature.returns.check(client.execute(name), name)
            asked += 1
    assert asked > 25


def test_a_plugins_commands_are_described(plugins: Plugins, folder: Path) -> None:
    from tests.qmp.test_server import Plugin

    plugins.register(Plugin(), "third-party")
    engine = Engine(TinyMachine(), plugins, plugins.settings())
    with QmpServer(engine, f"unix:{folder}/other") as server, QmpClient(server.address) as client:
        found = {entry["name"]: entry for entry in client.execute("query-qmp-schema")}
        described = {
            one["name"]: (one["type"], "default" in one) for one in found[found["x-add"]["arg-type"]]["members"]
        }
    engine.close()
    assert described == {
        "first-number": ("int", False),
        "second": ("number", True),
        "names": ("[str]OrNull", True),
    }


# -- the human monitor -------------------------------------------------------------------------------------------------


def typed(client: QmpClient, line: str) -> str:
    text = client.execute("human-monitor-command", {"command-line": line})
    assert isinstance(text, str)
    assert "\n" not in text.replace("\r\n", "")
    return text.replace("\r\n", "\n")


def test_the_monitors_lines(client: QmpClient, engine: Engine) -> None:
    assert typed(client, "info status") == "VM status: paused (prelaunch)\n"
    assert typed(client, "cont") == ""
    assert typed(client, "info status") == "VM status: running\n"
    assert typed(client, "s") == ""
    assert typed(client, "info status") == "VM status: paused\n"
    assert typed(client, "info name") == "tiny\n"
    assert typed(client, "info uuid") == "00000000-0000-0000-0000-000000000000\n"
    assert typed(client, "info version").startswith("7.2.0migfw ")
    assert typed(client, "info migrate") == ""
    assert "events: off\n" in typed(client, "info migrate_capabilities")
    assert typed(client, "migrate_set_capability events on") == ""
    assert "events: on\n" in typed(client, "info migrate_capabilities")
    assert typed(client, "migrate_set_parameter downtime-limit 0.5s") == ""
    assert "downtime-limit: 500 ms\n" in typed(client, "info migrate_parameters")
    waits = "terminal does not allow synchronous migration, continuing detached\n"
    assert typed(client, "migrate tcp:127.0.0.1:1") == waits
    assert engine.wait_outgoing(PATIENCE) == "failed"
    assert typed(client, "info migrate").startswith("Migration status: failed (tcp:127.0.0.1:1: connection refused")
    assert typed(client, "migrate -d tcp:127.0.0.1:1") == ""
    assert engine.wait_outgoing(PATIENCE) == "failed"
    assert "Error: unknown parameter 'downtime-limt' (did you mean" in typed(
        client, "migrate_set_parameter downtime-limt 5"
    )
    assert typed(client, "migrate nope:x").startswith("Error: 'nope:x': no installed plugin has the scheme 'nope'")


def test_the_monitors_help(client: QmpClient) -> None:
    names = re.findall(r"^([\w|?]+) .*-- ", typed(client, "help"), re.MULTILINE)
    assert {"migrate", "info", "stop|s"} <= set(names)
    for name in names:
        assert typed(client, f"help {name.split('|')[0]}").startswith(f"{name} ")
    for line in typed(client, "info").splitlines():
        assert "unknown" not in typed(client, line.partition(" -- ")[0].replace("[-a]", ""))


QUOTED = (
    *("migrate exec:cat > /dev/null", 'migrate "exec:true" x', 'migrate "exec:true', 'migrate "a\\q"', "migrate -d"),
    *('closefd "a b"', "closefd 'a b'", 'closefd "a"b', r'closefd "\"\\\'"', '"migrate" x', 'info "name"'),
)


def test_the_monitor_takes_a_command_in_quotes(client: QmpClient, engine: Engine, tmp_path: Path) -> None:
    typed(client, f'migrate -d "exec:printf \\"%s\\" x > {tmp_path}/out; cat > /dev/null; exit 7"')
    assert engine.wait_outgoing(PATIENCE) == "failed"
    assert "status 7" in typed(client, "info migrate")
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.qemu
def test_the_monitor_refuses_as_qemus(qemu: Path, client: QmpClient) -> None:
    with QmpClient(f"unix:{qemu}") as theirs:
        for line in (
            "nonsense",
            "info nonsense",
            "migrate",
            "migrate x y",
            "stop x",
            "info uuid",
            "info block",
            "",
            *QUOTED,
        ):
            assert typed(client, line) == typed(theirs, line), line


# -- channels ----------------------------------------------------------------------------------------------------------


def channel(transport: str, **rest: object) -> dict[str, object]:
    return {"channel-type": "main", "addr": {"transport": transport, **rest}}


def refused(client: QmpClient, *channels: object, **arguments: object) -> str:
    with pytest.raises(QmpError) as caught:
        client.execute("migrate", {"channels": channels, **arguments})
    return caught.value.desc


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        (channel("socket", type="inet", host="127.0.0.1", port="1"), "tcp:127.0.0.1:1"),
        (channel("socket", type="unix", path="/nowhere/x"), "unix:/nowhere/x"),
        (channel("exec", args=["/bin/sh", "-c", "exit 3"]), "exec:exit 3"),
        (channel("exec", args=["sh", "-c", "exit 3 # x"]), "exec:sh -c 'exit 3 # x'"),
        (channel("file", filename="/nowhere/x", offset=0), "file:/nowhere/x"),
    ],
)
def test_a_channel_is_the_uri_that_means_the_same(client: QmpClient, engine: Engine, address: object, uri: str) -> None:
    client.execute("migrate", {"channels": [address]})
    assert engine.wait_outgoing(PATIENCE) == "failed"
    assert client.execute("query-migrate")["error-desc"].startswith(f"{uri}: ")


def test_what_is_no_channel(client: QmpClient) -> None:
    inet = channel("socket", type="inet", host="h", port="1")
    assert refused(client, inet, uri="tcp:h:1") == "need either 'uri' or 'channels' argument"
    assert refused(client, inet, inet) == "Channel list must have only one entry, for type 'main'"
    assert refused(client) == "Parameter 'uri' is missing"
    assert "is missing" in refused(client, channel("socket"))
    assert "'rdma' is not supported" in refused(client, channel("rdma", host="h", port="1"))
    assert "'vsock' is not supported" in refused(client, channel("socket", type="vsock", cid="3", port="1"))
    assert "'cpr' is not supported" in refused(client, {**inet, "channel-type": "cpr"})
    assert "'mptcp' of a socket address is not supported" in refused(
        client, channel("socket", type="inet", host="h", port="1", mptcp=True)
    )
    assert "did you mean host" in refused(client, channel("socket", type="inet", host="h", port="1", hots="x"))
    assert "'no-port' of a socket address is not a number" in refused(
        client, channel("socket", type="inet", host="h", port="no-port")
    )


def test_names_are_suggested(client: QmpClient) -> None:
    def why(command: str, **arguments: object) -> str:
        with pytest.raises(QmpError) as caught:
            client.execute(command, arguments)
        return caught.value.desc

    assert why("query-migrat") == "The command query-migrat has not been found (did you mean query-migrate?)"
    assert why("migrate", urii="tcp:h:1") == "Parameter 'urii' is unexpected (did you mean uri?)"
    assert why("migrate-set-parameters", downtime_limit=3).endswith("(did you mean downtime-limit?)")
    assert "(did you mean postcopy-ram?)" in why(
        "migrate-set-capabilities", capabilities=[{"capability": "postcopy_ram", "state": True}]
    )
