"""Who may connect to the server; no client can keep the others out."""

from __future__ import annotations

import array
import contextlib
import http.client
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from corefw.engine import Engine
from corefw.machine import RunState
from corefw.net import descriptors
from corefw.qmp.client import QmpClient
from corefw.qmp.server import MAX_CLIENTS, QmpServer
from corefw.testing.tasks import wait_until
from corefw.uri import TcpAddress
from tests.helpers.engines import PATIENCE
from tests.qmp.support import RawClient, path_of

COMMANDS = b'{"execute": "qmp_capabilities"}\n{"execute": "cont"}\n{"execute": "quit"}\n'


@pytest.fixture
def tcp(engine: Engine) -> Iterator[QmpServer]:
    with QmpServer(engine, "tcp:127.0.0.1:0") as server:
        yield server


def port_of(server: QmpServer) -> int:
    assert isinstance(server.address, TcpAddress)
    return server.address.port


def nothing_was_run(server: QmpServer, engine: Engine) -> bool:
    with QmpClient(server.address) as client:
        client.execute("query-name")
    return engine.machine.run_state is RunState.PRELAUNCH and not server.wait_quit(0)


# -- requests that are not QMP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "null", "3", "true", "'x'"])
def test_commands_in_an_http_request_are_not_run(
    tcp: QmpServer, engine: Engine, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port_of(tcp)}/", data=COMMANDS, method=method)
    with pytest.raises((urllib.error.URLError, http.client.HTTPException, ConnectionError)):
        urllib.request.urlopen(request, timeout=PATIENCE)
    assert wait_until(lambda: "and nothing that it sent was run" in caplog.text)
    assert nothing_was_run(tcp, engine)


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\n\r\n", b"\r\n  \tPOST", b"\x16\x03\x01", b"\0", b"\xff", b"\xef\xbb\xbf"]
)
@pytest.mark.parametrize("apart", [False, True])
def test_what_cannot_begin_json_ends_the_connection(
    tcp: QmpServer, engine: Engine, first: bytes, *, apart: bool
) -> None:
    with socket.create_connection(("127.0.0.1", port_of(tcp)), PATIENCE) as sock:
        sock.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError):
            if apart:
                for byte in first:
                    sock.sendall(bytes([byte]))
                sock.sendall(COMMANDS)
            else:
                sock.sendall(first + COMMANDS)
            received = b""
            while data := sock.recv(4096):
                received += data
            assert received.count(b"\n") == 1, "the greeting and nothing else"
    assert nothing_was_run(tcp, engine)


def test_white_space_may_come_first(tcp: QmpServer) -> None:
    with socket.create_connection(("127.0.0.1", port_of(tcp)), PATIENCE) as sock, sock.makefile("rb") as file:
        file.readline()
        for piece in (b" \r\n", b"\t", b'  {"execute": "qmp_capabilities"}'):
            sock.sendall(piece)
        assert file.readline() == b'{"return": {}}\r\n'


# -- too many clients --------------------------------------------------------------------------------------------------


def is_connected(client: RawClient) -> bool:
    try:
        return client.ask(b'{"execute": "query-name"}') == {"return": {"name": "tiny"}}
    except (EOFError, ConnectionError):
        return False


def test_clients_that_never_negotiate_do_not_lock_others_out(server: QmpServer) -> None:
    path = path_of(server.address)
    with contextlib.ExitStack() as stack:
        working = stack.enter_context(RawClient(path))
        strangers = [stack.enter_context(RawClient(path, negotiate=False)) for _ in range(2 * MAX_CLIENTS)]
        new = stack.enter_context(RawClient(path))
        assert is_connected(new)
        assert is_connected(working), "it was there first, and has negotiated"
        for one in strangers[: MAX_CLIENTS // 2]:
            with pytest.raises((EOFError, ConnectionError)):
                one.read()
        assert server.clients <= MAX_CLIENTS


HOG = """
import socket, sys
held = []
for _ in range(int(sys.argv[2])):
    one = socket.socket(socket.AF_UNIX)
    one.connect(sys.argv[1])
    one.sendall(b'{"execute": "qmp_capabilities"}')
    one.makefile("rb").readline()
    held.append(one)
print("full", flush=True)
sys.stdin.read()
"""


def test_a_process_with_many_idle_clients_loses_its_own(server: QmpServer) -> None:
    path = path_of(server.address)
    with RawClient(path) as working:
        hog = subprocess.Popen(
            [sys.executable, "-c", HOG, path, str(MAX_CLIENTS - 1)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert hog.stdout
            assert hog.stdout.readline() == b"full\n"
            with RawClient(path) as second, RawClient(path) as third:
                assert is_connected(working)
                assert is_connected(second)
                assert is_connected(third)
        finally:
            hog.communicate()


def test_among_equals_the_one_that_was_silent_longest_leaves(server: QmpServer) -> None:
    path = path_of(server.address)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(path)) for _ in range(MAX_CLIENTS)]
        assert is_connected(clients[0])
        assert is_connected(stack.enter_context(RawClient(path)))
        assert [number for number, one in enumerate(clients) if not is_connected(one)] == [1]


# -- getfd -------------------------------------------------------------------------------------------------------------


def hand_over(client: RawClient, name: str, fd: int) -> dict[str, object]:
    data = b'{"execute": "getfd", "arguments": {"fdname": "%s"}}' % name.encode()
    client.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    return client.read()


def test_descriptors_are_kept_up_to_a_number(server: QmpServer) -> None:
    limit = descriptors.MAX_DESCRIPTORS
    reader, writer = os.pipe()
    try:
        with RawClient(path_of(server.address)) as client:
            for number in range(limit):
                assert hand_over(client, f"n{number}", writer) == {"return": {}}
            refused = hand_over(client, "more", writer)
            assert f"{limit} are kept already" in str(refused["error"])
            assert "closefd" in str(refused["error"])
            assert hand_over(client, "n0", writer) == {"return": {}}, "it replaces one"
            assert client.ask(b'{"execute": "closefd", "arguments": {"fdname": "n1"}}') == {"return": {}}
            assert hand_over(client, "more", writer) == {"return": {}}
            assert "characters" in str(hand_over(client, "x" * 300, writer)["error"])
    finally:
        for name in (*(f"n{number}" for number in range(limit)), "more"):
            if (kept := descriptors.take(name)) is not None:
                os.close(kept)
        os.close(writer)
    assert os.read(reader, 1) == b"", "those that were refused are closed"
    os.close(reader)
