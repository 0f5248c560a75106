"""zmq: keeps the contract of corefw.channel, over tcp and ipc, in the clear and with CURVE."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq.auth
from corefw_transport_zmq import ZmqTransport

from corefw.channel import TransportFeatures
from corefw.testing.transport import TransportCase, applicable, check_transport

COUNT = itertools.count()
MIB = 1 << 20

WRONG = (
    "zmq:host:1",
    "zmq:tcp:host:1",
    "zmq:udp://host:1",
    "zmq:tcp://",
    "zmq:tcp://nohost",
    "zmq:tcp://host:65536",
    "zmq:tcp://user@host:1",
    "zmq:tcp://::1:80",
    "zmq:ipc://",
    "zmq:ipc://*",
    "zmq:ipc:///" + "x" * 108,
    "zmq:tcp://host:1?",
    "zmq:tcp://host:1?hwm=7",
    "zmq:tcp://host:1?key=",
    "zmq:tcp://host:1?key=/nowhere&server-key=/nowhere",
    "zmq:tcp://host:1?server-key=/nowhere",
    "zmq:tcp://host:1?key=a&key=b",
)


@contextlib.contextmanager
def stuck() -> Iterator[str]:
    """A host that accepts the connection and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"zmq:tcp://127.0.0.1:{listener.getsockname()[1]}"


def tcp(_: Path) -> TransportCase:
    return TransportCase(
        transport=ZmqTransport,
        listen=lambda: "zmq:tcp://127.0.0.1:0",
        wrong=WRONG,
        features=TransportFeatures(return_path=True, multi_channel=True),
        refused="zmq:tcp://127.0.0.1:1",
        stuck=stuck,
        stream_bytes=32 * MIB,
    )


def ipc(folder: Path) -> TransportCase:
    return TransportCase(
        transport=ZmqTransport,
        listen=lambda: f"zmq:ipc://{folder}/{next(COUNT)}",
        refused=f"zmq:ipc://{folder}/nobody",
        features=TransportFeatures(return_path=True, multi_channel=True),
        stream_bytes=32 * MIB,
    )


def curve(folder: Path) -> TransportCase:
    def listen() -> str:
        if not (folder / "in").exists():
            (folder / "in").mkdir()
            zmq.auth.create_certificates(folder, "server")
            zmq.auth.create_certificates(folder, "client")
            (folder / "client.key").rename(folder / "in" / "client.key")
        return f"zmq:tcp://127.0.0.1:0?key={folder}/server.key_secret&authorized={folder}/in"

    return TransportCase(
        transport=ZmqTransport,
        listen=listen,
        dial=lambda uri: str(uri).partition("?")[0] + f"?key={folder}/client.key_secret&server-key={folder}/server.key",
        features=TransportFeatures(return_path=True, multi_channel=True, incoming=False),
        stream_bytes=16 * MIB,
    )


MATRIX = [(case, check) for case in (tcp, ipc, curve) for check in applicable(case(Path()))]


@pytest.mark.parametrize(("case", "check"), MATRIX)
def test_contract(case: Callable[[Path], TransportCase], check: str, short_folder: Path) -> None:
    assert check_transport(case(short_folder), only=[check]) == [check]
