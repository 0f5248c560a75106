"""Our client with our server, and with peers that are not QMP servers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from corefw.engine import Engine
from corefw.errors import ChannelClosed, ChannelError
from corefw.net import descriptors
from corefw.net.socketfile import Occupant, occupant
from corefw.plugins import Plugins
from corefw.qmp.client import QmpClient, QmpError
from corefw.qmp.server import QmpServer
from tests.helpers.engines import PATIENCE
from tests.qmp.support import TinyMachine

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@contextlib.contextmanager
def peer(folder: Path, *says: bytes, hold: bool = False) -> Iterator[str]:
    """A peer that answers each message, whatever it is, with the next of these texts; then it may hang up."""
    path = folder / "peer"
    done = threading.Event()

    def talk() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(PATIENCE)
            for number, line in enumerate(says):
                if number:
                    connection.recv(1 << 16)
                connection.sendall(line)
            if hold:
                done.wait(PATIENCE)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=talk)
        thread.start()
        try:
            yield f"unix:{path}"
        finally:
            done.set()
            thread.join()


def test_commands_errors_and_events(server: QmpServer) -> None:
    with QmpClient(server.address) as client, QmpClient(str(server.address)) as other:
        assert client.greeting["version"]["qemu"]["major"] == 7
        client.execute("cont")
        assert client.execute("query-status") == {"running": True, "singlestep": False, "status": "running"}
        with pytest.raises(QmpError, match="The command foo has not been found") as caught:
            client.execute("foo")
        assert (caught.value.error_class, caught.value.desc) == ("CommandNotFound", str(caught.value))
        with pytest.raises(QmpError, match="'uri' is missing"):
            client.execute("migrate", {})
        other.execute("stop")
        for one in (client, other):
            assert [event.name for event in (one.wait_event(PATIENCE), one.wait_event(PATIENCE)) if event] == [
                "RESUME",
                "STOP",
            ]
            assert one.wait_event(0) is None
        assert client.execute("query-name") == {"name": "tiny"}


def test_descriptors_go_along(server: QmpServer) -> None:
    reader, writer = os.pipe()
    with QmpClient(server.address) as client:
        client.execute("getfd", {"fdname": "given"}, fds=[writer])
    taken = descriptors.take("given")
    assert taken is not None
    assert os.fstat(taken).st_ino == os.fstat(writer).st_ino
    for fd in (reader, writer, taken):
        os.close(fd)


@pytest.mark.qemu
def test_descriptors_go_to_a_qemu_too(qemu: Path) -> None:
    reader, writer = os.pipe()
    with QmpClient(f"unix:{qemu}") as client:
        client.execute("getfd", {"fdname": "given"}, fds=[writer])
        os.close(writer)
        client.execute("closefd", {"fdname": "given"})
        assert os.read(reader, 1) == b""
        with pytest.raises(QmpError, match="'given' not found"):
            client.execute("closefd", {"fdname": "given"})
    os.close(reader)


def test_a_real_migration_under_qmp(server: QmpServer, plugins: Plugins, folder: Path) -> None:
    target = Engine(TinyMachine(incoming=True), plugins, plugins.settings())
    there = f"unix:{folder}/there"
    with (
        contextlib.closing(target),
        QmpServer(target, f"unix:{folder}/qmp2") as second,
        QmpClient(server.address) as source,
        QmpClient(second.address) as destination,
    ):
        source.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
        source.execute("cont")
        destination.execute("migrate-incoming", {"uri": there})
        assert destination.execute("x-migfw-status")["incoming-uri"] == there
        source.execute("migrate", {"uri": there})
        seen = []
        for event in source.events(PATIENCE):
            seen.append(event.data.get("status", event.name))
            if seen[-1] in ("completed", "failed"):
                break
        order = ["RESUME", "setup", "active", "STOP", "completed"]
        assert [name for name in seen if name in order] == order, source.execute("query-migrate")
        assert source.execute("query-migrate")["status"] == "completed"
        target.wait_incoming(PATIENCE)
        assert destination.execute("query-status")["running"]


@pytest.mark.parametrize("address", ["unix:/nowhere/at/all", "tcp:127.0.0.1:1"])
def test_no_server_is_there(address: str) -> None:
    with pytest.raises(ChannelError, match=f"no migfw or QEMU answers at {address}: "):
        QmpClient(address)


def test_a_peer_that_says_nothing(folder: Path) -> None:
    with peer(folder, hold=True) as address, pytest.raises(ChannelError, match="sends no greeting"):
        QmpClient(address, timeout=0.05)


def test_a_peer_whose_backlog_is_full(folder: Path) -> None:
    path = str(folder / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(ChannelError, match="sends no greeting"):
            QmpClient(f"unix:{path}", timeout=0.05)
        assert occupant(Path(path)) is Occupant.LISTENER


@pytest.mark.parametrize(
    "line", [b"SSH-2.0-OpenSSH_9.2\r\n", b"[]\n", b"{}\n", b'{"QMP": 3}\n', b"\xff\xff", b'{"event": "X"}\n[1]\n']
)
def test_a_peer_that_speaks_something_else(folder: Path, line: bytes) -> None:
    with peer(folder, line, hold=True) as address, pytest.raises(ChannelError, match="does not speak QMP"):
        QmpClient(address)


@pytest.mark.parametrize("says", [(), (GREETING,), (GREETING, b'{"return": {}, "id": "migfw-1"}', b'{"ret')])
def test_a_peer_that_hangs_up(folder: Path, says: tuple[bytes, ...]) -> None:
    with peer(folder, *says) as address, pytest.raises(ChannelClosed), QmpClient(address) as client:
        client.execute("query-name")


def test_late_and_odd_replies(folder: Path) -> None:
    says = (
        GREETING,
        b'{"return": {}, "id": "migfw-1"}{"event": "ODD"}{"event": "ODDER", "timestamp": [], "data": 3}',
        b"{\r\n",
        b'"return": 1, "id": "migfw-2"}\r\n{\r\n  "return":\r\n 2, "id": "migfw-3"\r\n}',
        b'{"error": "odd", "id": "migfw-4"}',
    )
    with peer(folder, *says, hold=True) as address, QmpClient(address) as client:
        with pytest.raises(ChannelError, match=r"did not answer 'slow' within 0\.05 s"):
            client.execute("slow", timeout=0.05)
        assert client.execute("quick") == 2
        with pytest.raises(QmpError, match="odd"):
            client.execute("odd")
        assert [(event.name, event.data) for event in client.events(0)] == [("ODD", {}), ("ODDER", {})]


def test_a_flood_of_events_is_no_reply(folder: Path) -> None:
    flood = b'{"event": "FLOOD"}' * 200_000
    says = (GREETING, b'{"return": {}, "id": "migfw-1"}' + flood)
    with (
        peer(folder, *says, hold=True) as address,
        QmpClient(address) as client,
        pytest.raises(ChannelError, match="did not answer"),
    ):
        client.execute("query-name", timeout=0.05)


@pytest.mark.parametrize(
    ("module", "left"),
    [
        ("client", ("numpy", "asyncio", "pluggy", "corefw.net.sockets", "corefw.engine")),
        ("server", ("numpy", "asyncio")),
    ],
)
def test_it_is_light_to_import(module: str, left: tuple[str, ...]) -> None:
    script = f"import sys, corefw.qmp.{module}; print([name for name in {left} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout.strip() == b"[]"
