"""exec:, fd: and file: keep the contract of corefw.channel."""

from __future__ import annotations

import itertools
import os
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from corefw_transport_exec import ExecTransport, FdTransport, FileTransport

from corefw.channel import TransportFeatures
from corefw.net import descriptors
from corefw.testing.transport import TransportCase, applicable, check_transport
from corefw.uri import MigrationUri

COUNT = itertools.count()


def through_commands(folder: Path) -> TransportCase:
    """Two commands that are joined by a FIFO."""

    def listen() -> str:
        fifo = folder / f"fifo{next(COUNT)}"
        os.mkfifo(fifo)
        return f"exec:cat {shlex.quote(str(fifo))}"

    return TransportCase(
        transport=ExecTransport,
        listen=listen,
        dial=lambda uri: f"exec:cat > {uri.rest.removeprefix('cat ')}",
        wrong=("exec: ", "exec:a\0b"),
        shows_breaks=False,
    )


def descriptors_of(make: Callable[[], tuple[int, int]], features: TransportFeatures) -> Callable[[Path], TransportCase]:
    """The names of two connected descriptors: the first is in the URI to listen at."""

    def listen() -> str:
        into, out = make()
        name = f"end{next(COUNT)}"
        descriptors.put(name, into)
        descriptors.put(f"{name}-peer", out)
        return f"fd:{name}"

    def dial(uri: MigrationUri) -> str:
        return f"fd:{uri.rest}-peer"

    return lambda _: TransportCase(
        transport=FdTransport,
        listen=listen,
        dial=dial,
        wrong=("fd:no-such-name", "fd:987654", "fd:99999999999999999999", "fd:-1"),
        features=features,
        shows_breaks=False,
    )


def socketpair() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


def tcp_pair() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        out = socket.create_connection(listener.getsockname())
        return listener.accept()[0].detach(), out.detach()


def in_a_file(folder: Path) -> TransportCase:
    return TransportCase(
        transport=FileTransport,
        listen=lambda: f"file:{folder}/stream{next(COUNT)}",
        wrong=("file:a\0b", "file:/tmp/"),
        stored=True,
    )


CASES = {
    "exec": through_commands,
    "fd-pipe": descriptors_of(os.pipe, TransportFeatures(return_path=False, multi_channel=False, incoming=False)),
    "fd-socketpair": descriptors_of(socketpair, TransportFeatures(return_path=True, multi_channel=False)),
    "fd-tcp": descriptors_of(tcp_pair, TransportFeatures(return_path=True, multi_channel=False)),
    "file": in_a_file,
}


MATRIX = [(name, check) for name, case in CASES.items() for check in applicable(case(Path()))]


@pytest.mark.parametrize(("case", "check"), MATRIX)
def test_contract(case: str, check: str, tmp_path: Path) -> None:
    assert check_transport(CASES[case](tmp_path), only=[check]) == [check]
