"""The server over real sockets: many clients, hostile ones, and ones that do not read."""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
import stat
import threading
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corefw import hookspecs
from corefw.control import MigrationControl
from corefw.engine import Engine
from corefw.errors import ChannelError, MigfwError
from corefw.machine import RunState
from corefw.net import descriptors
from corefw.plugins import Plugins
from corefw.qmp.client import QmpClient
from corefw.qmp.connection import OUTPUT_LIMIT
from corefw.qmp.server import QmpServer
from corefw.uri import TcpAddress
from tests.helpers.engines import PATIENCE
from tests.qmp.support import RawClient, path_of
from tests.qmp.test_json_stream import cut, jsonish

CAPABILITIES = b'{"execute": "qmp_capabilities"}'


class Plugin:
    """Commands of a third party."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()

    @hookspecs.hookimpl
    def corefw_commands(self, control: MigrationControl) -> Mapping[str, Callable[..., object]]:
        def wait() -> None:
            self.entered.set()
            assert self.gate.wait(PATIENCE)

        def add(first_number: int, second: float = 0.5, names: list[str] | None = None) -> object:
            return {"sum": first_number + second, "names": names, "engine": control.name}

        def crash() -> None:
            raise RuntimeError("not a MigfwError")

        def give_up() -> None:
            raise CancelledError

        def refuse() -> None:
            raise MigfwError("no, because")

        def unspeakable() -> object:
            return {"set": {1, 2}}

        return {
            "x-wait": wait,
            "x-add": add,
            "x-crash": crash,
            "x-refuse": refuse,
            "x-unspeakable": unspeakable,
            "x-give-up": give_up,
        }


@pytest.fixture
def plugin(plugins: Plugins) -> Iterator[Plugin]:
    plugin = Plugin()
    plugins.register(plugin, "third-party")
    yield plugin
    plugin.gate.set()


@pytest.fixture
def client(plugin: Plugin, server: QmpServer) -> Iterator[RawClient]:
    with RawClient(path_of(server.address)) as client:
        yield client


# -- listening ---------------------------------------------------------------------------------------------------------


def test_the_socket_is_the_users_own_and_goes_away(engine: Engine, folder: Path) -> None:
    path = folder / "qmp"
    with QmpServer(engine, f"unix:{path}") as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [entry.name for entry in folder.iterdir()] == ["qmp"]
        assert str(server.address) == f"unix:{path}"
    assert not path.exists()


def test_a_dead_socket_is_replaced(engine: Engine, folder: Path) -> None:
    path = folder / "qmp"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with QmpServer(engine, f"unix:{path}"), RawClient(path):
        pass


def test_a_live_socket_is_left_alone(server: QmpServer, engine: Engine) -> None:
    with pytest.raises(ChannelError, match="the address is in use"):
        QmpServer(engine, server.address)
    with RawClient(path_of(server.address)):
        pass


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_what_is_no_socket_is_left_alone(engine: Engine, folder: Path, make: Callable[[Path], None]) -> None:
    path = folder / "file"
    make(path)
    before = path.lstat()
    with pytest.raises(ChannelError, match="not a stale socket of yours"):
        QmpServer(engine, f"unix:{path}")
    assert path.lstat().st_ino == before.st_ino
    assert [entry.name for entry in folder.iterdir()] == ["file"]


def test_a_file_system_without_hard_links_will_do(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    path = folder / "qmp"
    with QmpServer(engine, f"unix:{path}"), RawClient(path):
        with pytest.raises(ChannelError, match="the address is in use"):
            QmpServer(engine, f"unix:{path}")
        assert [entry.name for entry in folder.iterdir()] == ["qmp"]
    assert not any(folder.iterdir())


def test_a_socket_that_took_our_place_is_not_removed(engine: Engine, folder: Path) -> None:
    path = folder / "qmp"
    with QmpServer(engine, f"unix:{path}"):
        path.unlink()
        path.touch()
    assert path.exists()


@pytest.mark.parametrize(
    ("address", "why"), [("unix:/nowhere/qmp", "no such file"), ("tcp:192.0.2.1:4444", "does not have that")]
)
def test_where_one_cannot_listen(engine: Engine, address: str, why: str) -> None:
    with pytest.raises(ChannelError, match=f"{address}: .*{why}"):
        QmpServer(engine, address)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_tcp_reports_the_port_that_it_got(engine: Engine, host: str) -> None:
    try:
        server = QmpServer(engine, f"tcp:{host}:0")
    except ChannelError:
        pytest.skip(f"needs {host}")
    with server:
        assert isinstance(server.address, TcpAddress)
        assert server.address.port > 0
        with QmpClient(str(server.address)) as client:
            assert client.execute("query-name") == {"name": "tiny"}
            with pytest.raises(ChannelError, match="UNIX socket only"):
                client.execute("getfd", {"fdname": "x"}, fds=[0])


def test_no_host_is_every_address_of_this_one(engine: Engine) -> None:
    with QmpServer(engine, "tcp::0") as server:
        assert isinstance(server.address, TcpAddress)
        for host in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
            with QmpClient(TcpAddress(host, server.address.port)) as client:
                assert client.execute("query-name") == {"name": "tiny"}


def shapeless(data: bytes) -> None: ...


def unhinged(data: contextlib.missing) -> None: ...  # type: ignore[name-defined]  # what is tested


@pytest.mark.parametrize(
    ("name", "function", "why"),
    [
        ("stop", dict, "the core has a command of that name"),
        ("x-shapeless", shapeless, "is not a valid command schema: <class 'bytes'> is not a JSON type"),
        ("x-unhinged", unhinged, "is not a valid command schema: module 'contextlib' has no attribute 'missing'"),
        ("x-nothing", None, "is not a valid command schema: None is not a callable object"),
    ],
)
def test_a_plugins_command_that_cannot_be_one_is_left_out(
    name: str,
    function: Callable[..., object],
    why: str,
    engine: Engine,
    plugins: Plugins,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Greedy:
        @hookspecs.hookimpl
        def corefw_commands(self, control: MigrationControl) -> Mapping[str, Callable[..., object]]:
            return {name: function, "x-fine": lambda: "fine"}

    plugins.register(Greedy(), "greedy")
    with QmpServer(engine, f"unix:{folder}/qmp") as server, QmpClient(server.address) as client:
        assert client.execute("x-fine") == "fine"
        assert client.execute("stop") == {}, "which is the core's"
        assert [entry["name"] for entry in client.execute("query-commands")].count(name) == (name == "stop")
    (line,) = caplog.messages
    assert line.startswith(f"plugin 'greedy' adds the command '{name}', which is left out: ")
    assert line.endswith(why)


# -- one conversation --------------------------------------------------------------------------------------------------


def test_greeting_and_negotiation(server: QmpServer) -> None:
    with RawClient(path_of(server.address), negotiate=False) as client:
        greeting = client.greeting["QMP"]
        assert isinstance(greeting, dict)
        assert greeting["version"]["qemu"] == {"major": 7, "minor": 2, "micro": 0}
        assert greeting["version"]["package"].startswith("migfw ")
        refused = client.ask(b'{"execute": "stop", "id": null}')
        assert refused == {
            "error": {
                "class": "CommandNotFound",
                "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
            },
            "id": None,
        }
        assert client.ask(CAPABILITIES) == {"return": {}}
        assert client.ask(b'{"execute": "stop", "id": [{}]}') == {"return": {}, "id": [{}]}


def test_pipelined_requests_are_answered_in_order(client: RawClient) -> None:
    client.send(b"".join(b'{"execute": "query-name", "id": %d}' % number for number in range(3000)))
    assert [reply["id"] for reply in client.rest()] == list(range(3000))


@given(places=st.lists(st.integers(0, 10**4), max_size=20))
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_pieces_make_no_difference(server: QmpServer, places: list[int]) -> None:
    requests = [CAPABILITIES, b'{"execute": "query-name", "id": "\\u00e9"} ', b"@\n", b'{"execute": "nope"}', b"[1]"]
    replies = []
    for pieces in ([b"".join(requests)], cut(b"".join(requests), places)):
        with RawClient(path_of(server.address), negotiate=False) as client:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            for piece in pieces:
                client.send(piece)
            replies.append(client.rest())
    assert replies[0] == replies[1]
    assert len(replies[0]) == len(requests)


@given(st.binary(max_size=200) | jsonish)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_no_bytes_end_the_server(server: QmpServer, data: bytes) -> None:
    with RawClient(path_of(server.address), negotiate=False) as client:
        client.send(data)
        client.rest()
    with RawClient(path_of(server.address)) as client:
        assert client.ask(b'{"execute": "query-name"}') == {"return": {"name": "tiny"}}


def test_a_command_that_crashes_ends_nothing(client: RawClient, caplog: pytest.LogCaptureFixture) -> None:
    reply = client.ask(b'{"execute": "x-crash", "id": 1}')
    assert "RuntimeError: not a MigfwError" in str(reply["error"])
    assert "RuntimeError" in caplog.text
    assert "TypeError" in str(client.ask(b'{"execute": "x-unspeakable", "id": 2}')["error"])
    assert "CancelledError" in str(client.ask(b'{"execute": "x-give-up"}')["error"])
    refused = client.ask(b'{"execute": "x-refuse", "id": 3}')
    assert refused == {"error": {"class": "GenericError", "desc": "no, because"}, "id": 3}


def test_a_plugins_signature_is_its_schema(client: RawClient) -> None:
    def add(arguments: object) -> object:
        reply = client.ask(json.dumps({"execute": "x-add", "arguments": arguments}).encode())
        return reply["error"]["desc"] if "error" in reply else reply["return"]  # type: ignore[index]

    assert add({"first-number": 1}) == {"sum": 1.5, "names": None, "engine": "tiny"}
    assert add({"first-number": 1, "second": 2, "names": ["x"]}) == {"sum": 3, "names": ["x"], "engine": "tiny"}
    assert add({}) == "Parameter 'first-number' is missing"
    assert (
        add({"first_number": 1, "first-number": 1})
        == "Parameter 'first_number' is unexpected (did you mean first-number?)"
    )
    assert add({"first-number": True}) == "Invalid parameter type for 'first-number', expected: integer"
    assert add({"first-number": 1, "names": ["x", 2]}) == "Invalid parameter type for 'names[1]', expected: string"


def test_a_deep_id_comes_back(client: RawClient) -> None:
    deep = b"[" * 500 + b"]" * 500
    assert client.ask(b'{"execute": "query-name", "id": %s}' % deep)["id"] == json.loads(deep)


def test_a_huge_message_is_refused_and_the_next_one_read(client: RawClient) -> None:
    client.send(b'{"execute": "query-name", "id": "' + b"x" * (3 << 20))
    assert "token size limit" in str(client.read()["error"])
    assert client.ask(b'"}\n{"execute": "query-name"}') == {"return": {"name": "tiny"}}


def test_an_out_of_band_command_overtakes(plugin: Plugin, server: QmpServer) -> None:
    with RawClient(path_of(server.address), negotiate=False) as client:
        client.send(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}{"execute": "x-wait", "id": 1}')
        client.send(b'{"execute": "query-name", "id": 2}{"exec-oob": "migrate-pause", "id": 3}')
        assert client.read() == {"return": {}}
        assert client.read()["id"] == 3
        plugin.gate.set()
        assert [client.read()["id"], client.read()["id"]] == [1, 2]


def test_a_long_command_does_not_keep_other_clients_waiting(
    plugin: Plugin, client: RawClient, server: QmpServer
) -> None:
    client.send(b'{"execute": "x-wait"}')
    assert plugin.entered.wait(PATIENCE)
    with RawClient(path_of(server.address)) as other:
        assert other.ask(b'{"execute": "query-name"}') == {"return": {"name": "tiny"}}
        plugin.gate.set()
        assert client.read() == {"return": {}}


def test_a_client_that_leaves_in_the_middle(plugin: Plugin, server: QmpServer) -> None:
    for _ in range(3):
        with RawClient(path_of(server.address)) as client:
            client.send(b'{"execute": "x-wait"}{"execute": "x-wait"}{"exec')
    plugin.gate.set()
    with RawClient(path_of(server.address)) as client:
        client.ask(b'{"execute": "query-name"}')


# -- events and several clients ----------------------------------------------------------------------------------------


def test_events_reach_all_that_have_negotiated(client: RawClient, server: QmpServer) -> None:
    with RawClient(path_of(server.address)) as second, RawClient(path_of(server.address), negotiate=False) as third:
        assert client.ask(b'{"execute": "cont"}')["event"] == "RESUME"
        assert client.read() == {"return": {}}
        assert second.read()["event"] == "RESUME"
        # Nothing but the reply comes to one that has not negotiated.
        assert third.ask(CAPABILITIES) == {"return": {}}
        event = third.ask(b'{"execute": "stop"}')
        assert event.keys() == {"event", "timestamp"}
        assert (event["event"], third.read()) == ("STOP", {"return": {}})


def test_the_end_of_the_guest_is_an_event(client: RawClient, engine: Engine) -> None:
    engine.machine.set_run_state(RunState.SHUTDOWN)
    event = client.read()
    assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})


def test_a_client_that_does_not_read_is_disconnected_and_keeps_no_one_waiting(
    client: RawClient, engine: Engine, server: QmpServer, caplog: pytest.LogCaptureFixture
) -> None:
    with RawClient(path_of(server.address)) as deaf:
        heard = 0
        while "does not read" not in caplog.text:
            engine.machine.start()
            engine.stop()
            heard += 2
            while heard > 200:  # the one that listens, does so
                client.read()
                heard -= 1
            assert heard < OUTPUT_LIMIT
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                deaf.read()


def test_a_client_that_does_not_read_replies_is_not_read_from(client: RawClient) -> None:
    client.socket.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while sent < 64 << 20:
            sent += client.socket.send(b'{"execute": "query-commands"}' * 100)
    client.socket.settimeout(PATIENCE)
    assert "return" in client.read()


def test_quit_answers_then_ends(engine: Engine, folder: Path) -> None:
    with QmpServer(engine, f"unix:{folder}/qmp") as server:
        with RawClient(path_of(server.address)) as client, RawClient(path_of(server.address)) as other:
            assert not server.wait_quit(0)
            client.send(b'{"execute": "quit", "id": 1}')
            assert server.wait_quit(PATIENCE)
            server.close()
            event = client.read()
            assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
            assert client.read() == {"return": {}, "id": 1}
            assert other.read()["event"] == "SHUTDOWN"
            for one in (client, other):
                with pytest.raises(EOFError):
                    one.read()
        server.close()


# -- descriptors -------------------------------------------------------------------------------------------------------


def send_with(client: RawClient, data: bytes, *fds: int) -> None:
    client.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def is_closed_everywhere(reader: int, writer: int) -> bool:
    """Close our writing end; the reader sees the end of the file once no other process has it open."""
    os.close(writer)
    return os.read(reader, 1) == b""


def test_getfd_keeps_a_descriptor_and_closefd_closes_it(client: RawClient, pipe: tuple[int, int]) -> None:
    request = b'{"execute": "getfd", "arguments": {"fdname": "pipe"}}'
    send_with(client, request[:10], pipe[1])
    client.send(request[10:])
    assert client.read() == {"return": {}}
    fd = descriptors.take("pipe")
    assert fd is not None
    os.write(fd, b"x")
    assert os.read(pipe[0], 1) == b"x"
    assert not os.get_inheritable(fd)
    descriptors.put("pipe", fd)
    assert client.ask(b'{"execute": "closefd", "arguments": {"fdname": "pipe"}}') == {"return": {}}
    assert "not found" in str(client.ask(b'{"execute": "closefd", "arguments": {"fdname": "pipe"}}')["error"])
    assert is_closed_everywhere(*pipe)


@pytest.mark.parametrize(
    "request_",
    [
        b'{"execute": "query-name"}',
        b'{"execute": "getfd", "arguments": {"fdname": 3}}',
        b'{"execute": "getfd", "arguments": {"fdname": "3x"}}',
        b'{"execute": "getfd", "arguments": {"fdname": ""}}',
        b'{"execute": "getfd"}',
        b"@",
    ],
)
def test_a_descriptor_that_is_not_kept_is_closed(client: RawClient, pipe: tuple[int, int], request_: bytes) -> None:
    send_with(client, request_, pipe[1], pipe[1])
    client.read()
    client.close()
    assert is_closed_everywhere(*pipe)


def test_a_descriptor_waits_for_its_getfd_until_others_come(client: RawClient, pipe: tuple[int, int]) -> None:
    getfd = b'{"execute": "getfd", "arguments": {"fdname": "x"}}'
    assert "SCM_RIGHTS" in str(client.ask(getfd)["error"])
    send_with(client, b" ", pipe[1])
    assert client.ask(b'{"execute": "query-name"}')["return"] is not None
    with Path(os.devnull).open("rb") as newer:
        send_with(client, b" ", newer.fileno())
    assert client.ask(getfd) == {"return": {}}
    assert is_closed_everywhere(*pipe)
    kept = descriptors.take("x")
    assert kept is not None
    assert os.read(kept, 1) == b""
    os.close(kept)
    assert "SCM_RIGHTS" in str(client.ask(getfd)["error"])


def test_descriptors_without_end_are_closed(client: RawClient, pipe: tuple[int, int]) -> None:
    for _ in range(50):
        send_with(client, b" ", *[pipe[1]] * 16)
    send_with(client, b'{"execute"', *[pipe[1]] * 16)
    client.close()
    assert is_closed_everywhere(*pipe)


def test_descriptors_before_negotiation_are_closed(server: QmpServer, pipe: tuple[int, int]) -> None:
    with RawClient(path_of(server.address), negotiate=False) as client:
        send_with(client, b'{"execute": "getfd", "arguments": {"fdname": "x"}}', pipe[1])
        assert "negotiation" in str(client.read()["error"])
        assert is_closed_everywhere(*pipe)


def test_a_client_for_which_no_thread_is_left_keeps_no_other_out(
    server: QmpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("qmp-io"):
            raise RuntimeError("no thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ChannelError):
            QmpClient(server.address)
    with QmpClient(server.address) as client:
        client.execute("query-status")
