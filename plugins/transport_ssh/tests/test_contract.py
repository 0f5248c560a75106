"""ssh: keeps the contract of corefw.channel, in every way through a real sshd."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corefw_transport_ssh import SshTransport
from corefw_transport_tcp import TcpTransport, UnixTransport

from corefw.channel import TransportFeatures
from corefw.testing.transport import TransportCase, applicable, check_transport
from tests.helpers.sshd import Sshd

COUNT = itertools.count()
MIB = 1 << 20

BOTH_WAYS = TransportFeatures(return_path=True, multi_channel=True)
DIALS_ONLY = TransportFeatures(return_path=True, multi_channel=True, incoming=False)

WRONG = (
    "ssh:host/tcp:a:1",
    "ssh://host",
    "ssh://host/",
    "ssh:///tcp:a:1",
    "ssh://user@/tcp:a:1",
    "ssh://host/exec:true",
    "ssh://host/tcp:nohost",
    "ssh://host/tcp:a:65536",
    "ssh://host/unix:relative",
    "ssh://host/unix:/" + "x" * 108,
    "ssh://host:0/tcp:a:1",
    "ssh://host:port/tcp:a:1",
    "ssh://-oProxyCommand=x/tcp:a:1",
    "ssh://us er@host/tcp:a:1",
)


@contextlib.contextmanager
def stuck() -> Iterator[str]:
    """A host that accepts the connection and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"ssh://127.0.0.1:{listener.getsockname()[1]}/tcp:127.0.0.1:1"


def to_tcp(address: str, _: Path) -> TransportCase:
    """Dial through the sshd to an ordinary tcp: listener."""
    return TransportCase(
        transport=SshTransport,
        listen_transport=TcpTransport,
        listen=lambda: "tcp:127.0.0.1:0",
        dial=lambda uri: f"ssh://{address}/{uri}",
        wrong=WRONG,
        refused=f"ssh://{address}/tcp:127.0.0.1:1",
        stuck=stuck,
        features=BOTH_WAYS,
        shows_breaks=False,  # sshd ends the connection behind it as if all had been well
        stream_bytes=16 * MIB,
    )


def to_unix(address: str, folder: Path) -> TransportCase:
    """Dial through the sshd to a unix: listener. Only opening differs, so a few checks suffice."""
    return TransportCase(
        transport=SshTransport,
        listen_transport=UnixTransport,
        listen=lambda: f"unix:{folder}/{next(COUNT)}",
        dial=lambda uri: f"ssh://{address}/{uri}",
        refused=f"ssh://{address}/unix:{folder}/nobody",
        features=DIALS_ONLY,
        shows_breaks=False,
        stream_bytes=16 * MIB,
    )


def both_ends(address: str, _: Path) -> TransportCase:
    """Listen at the sshd's host and dial there, as two hosts do that can reach only a third."""
    return TransportCase(
        transport=SshTransport,
        listen=lambda: f"ssh://{address}/tcp:127.0.0.1:0",
        features=BOTH_WAYS,
        shows_breaks=False,
        stream_bytes=16 * MIB,
    )


UNIX_CHECKS = ("streams-whole-and-in-order", "delivers-before-it-closes", "names-a-destination-that-is-not-there")

MATRIX = [
    *((to_tcp, check) for check in applicable(to_tcp("host", Path()))),
    *((both_ends, check) for check in applicable(both_ends("host", Path()))),
    *((to_unix, check) for check in UNIX_CHECKS),
]


@pytest.mark.sshd
@pytest.mark.parametrize(("case", "check"), MATRIX)
def test_contract(
    case: Callable[[str, Path], TransportCase], check: str, sshd: Sshd, home: Path, short_folder: Path
) -> None:
    assert check_transport(case(sshd.address, short_folder), only=[check]) == [check]
