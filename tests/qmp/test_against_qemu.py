"""Our server and a real QEMU give the same answers to the same bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from corefw.engine import Engine
from corefw.plugins import Plugins
from corefw.qmp.client import QmpClient
from corefw.qmp.server import QmpServer
from tests.qmp.support import RawClient, TinyMachine, path_of
from tests.qmp.test_json_stream import jsonish, messages

pytestmark = pytest.mark.qemu

# A byte that JSON never has makes both forget what they were reading.
END = b'\xff\n{"execute": "query-name", "id": "end"}'

NO_TEXT = re.compile("[\0\ufffd]+")
"""Stands for bytes in a message that are not UTF-8. The number of characters differs; QEMU reads an overlong zero as
a zero."""

HINT = re.compile(r" \(did you mean .+\?\)$")
"""The suggestion that we add to QEMU's texts."""


@pytest.fixture
def pair(qemu: Path, folder: Path, plugins: Plugins) -> object:
    engine = Engine(TinyMachine(), plugins, plugins.settings())
    with (
        QmpServer(engine, f"unix:{folder}/ours") as server,
        RawClient(path_of(server.address)) as ours,
        RawClient(qemu) as theirs,
    ):
        yield ours, theirs


def answers(client: RawClient, data: bytes) -> list[dict[str, object]]:
    client.send(data + END)
    replies: list[dict[str, object]] = []
    while (reply := client.read()).get("id") != "end":
        if isinstance(error := reply.get("error"), dict):
            error["desc"] = HINT.sub("", NO_TEXT.sub("\ufffd", error["desc"]))
        replies.append(reply)
    return replies


def request(command: str, **arguments: object) -> bytes:
    return json.dumps({"execute": command, "arguments": arguments}).encode()


def capabilities(value: object) -> bytes:
    return request("migrate-set-capabilities", capabilities=value)


ENVELOPES = [
    b"[1, 2]",
    b"{}",
    b'{"id": 3}',
    b'{"execute": 3}',
    b'{"execute": ""}',
    b'{"execute": "query-name", "foo": 1, "id": null}',
    b'{"execute": "query-name", "arguments": []}',
    b'{"execute": "query-name", "arguments": null}',
    b'{"execute": "query-name", "exec-oob": "x"}',
    b'{"exec-oob": "migrate-pause"}',
    b'{"execute": "foo", "id": {"a": [1, "x", 1.5, true]}}',
    b"{'execute': 'query-name', 'id': 'single \"quotes\"'}",
    b'{"execute": "query-name", "id": "\\u0000\\u00e9\xf0\x9f\x98\x80"}',
    b'{"execute": "query-name", "id": 1e5}',
    b'{"execute": "query-name", "id": 99999999999999999999999}',
    b'{"execute": "query-name"}}',
    b'{"execute": "query-name"]}{"execute": "query-name"}',
    b'{"a":}{"execute": "query-name"}',
    b'{"execute": "query-name", "id": 1}{"execute":"query-status"}\r\n\r\n {"execute": "query-name", "id": 2}',
]
ARGUMENTS = [
    request("qmp_capabilities"),
    request("qmp_capabilities", x=1),
    request("qmp_capabilities", enable=3),
    request("migrate"),
    request("migrate", uri=3),
    request("migrate", uri=None),
    request("migrate", uri="tcp:[::1]:1", detach=None),
    request("migrate", uri="tcp:[::1]:1", y=3),
    request("query-status", x=3),
    request("migrate-set-capabilities"),
    capabilities(3),
    capabilities([3]),
    capabilities([]),
    capabilities([{"capability": "events"}]),
    capabilities([{"capability": "events", "state": 1}]),
    capabilities([{"capability": "events", "state": True, "x": 1}]),
    request("migrate-set-parameters", foo="x"),
    request("migrate-set-parameters", **{"tls-creds": None, "downtime-limit": 200}),
    request("migrate-continue", state=1),
    request("migrate-continue", state="x"),
]
STATES = [
    request("migrate-continue", state="active"),
    request("migrate-start-postcopy"),
    request("migrate-pause"),
    request("migrate_cancel"),
    request("migrate-recover", uri="tcp:[::1]:1"),
    request("migrate-incoming", uri="tcp:[::1]:1"),
    request("closefd", fdname="x"),
    request("getfd", fdname="x"),
    request("query-status"),
    request("query-migrate"),
    request("stop"),
]


@pytest.mark.parametrize("requests", [ENVELOPES, ARGUMENTS, STATES])
def test_the_same_requests_get_the_same_answers(pair: tuple[RawClient, RawClient], requests: list[bytes]) -> None:
    for data in requests:
        assert answers(pair[0], data) == answers(pair[1], data), data


def test_the_same_values_get_the_same_answers(pair: tuple[RawClient, RawClient]) -> None:
    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(messages, st.booleans())
    def check(value: object, ascii_only: bool) -> None:
        data = json.dumps({"execute": "query-name", "id": value}, ensure_ascii=ascii_only).encode()
        assert answers(pair[0], data) == answers(pair[1], data)

    check()


def test_after_the_same_garbage_both_go_on(pair: tuple[RawClient, RawClient]) -> None:
    """Which parts of the garbage are errors is not compared: json_stream.py says what only QEMU accepts."""

    @settings(max_examples=200, suppress_health_check=list(HealthCheck))
    @given(jsonish | st.binary(max_size=40))
    @example(b'"\xc0\x80')
    @example(b"'\xed\xa0\x80\xf8")
    def check(data: bytes) -> None:
        for client in pair:
            for reply in answers(client, data):
                assert isinstance(error := reply.get("error"), dict)
                assert error["class"] == "GenericError"
                assert error["desc"].startswith(("JSON parse error, ", "QMP input "))

    check()


def test_the_same_negotiation(qemu: Path, folder: Path, engine: Engine) -> None:
    script = [
        b'{"execute": "query-name", "id": 1}{"foo": 1}@\n{"execute": "nope"}{"exec-oob": "qmp_capabilities"}',
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob", "oob"]}}',
        b'{"exec-oob": "query-status", "id": 1}{"exec-oob": "migrate-pause", "id": 1}{"exec-oob": "migrate-recover"}',
        b'{"exec-oob": "migrate-recover", "id": {}, "arguments": {"uri": 3}}{"exec-oob": 3}{"exec-oob": "nope"}',
        b'{"execute": "query-status", "exec-oob": "x"}{"exec-oob": "qmp_capabilities"}{"execute": "qmp_capabilities"}',
    ]
    found = []
    with QmpServer(engine, f"unix:{folder}/ours") as server:
        for path in (path_of(server.address), qemu):
            with RawClient(path, negotiate=False) as client:
                assert client.greeting["QMP"]["capabilities"] == ["oob"]  # type: ignore[index]
                # Out-of-band replies overtake the others, so the order varies.
                found.append(sorted(json.dumps(one, sort_keys=True) for one in answers(client, b"".join(script))))
    assert found[0] == found[1]


def test_run_states_and_events(pair: tuple[RawClient, RawClient]) -> None:
    found = []
    for client in pair:
        replies = [client.ask(b'{"execute": "cont"}'), client.read(), client.ask(b'{"execute": "query-status"}')]
        replies += [client.ask(b'{"execute": "stop"}'), client.read(), client.ask(b'{"execute": "query-status"}')]
        replies += [client.ask(b'{"execute": "quit"}'), client.read()]
        for reply in replies:
            if "event" in reply:
                stamp = reply.pop("timestamp")
                assert isinstance(stamp, dict)
                assert all(isinstance(stamp[unit], int) for unit in ("seconds", "microseconds"))
                assert 0 <= stamp["microseconds"] < 1_000_000
        found.append(replies)
    assert found[0] == found[1]


def test_our_client_drives_a_qemu(qemu: Path) -> None:
    with QmpClient(f"unix:{qemu}") as client:
        assert client.execute("query-version")["qemu"]["major"] >= 7
        assert {"capability": "events", "state": False} in client.execute("query-migrate-capabilities")
        assert len(client.execute("query-qmp-schema")) > 100
        client.execute("cont")
        client.execute("stop")
        assert [event.name for event in client.events(0)] == ["RESUME", "STOP"]
