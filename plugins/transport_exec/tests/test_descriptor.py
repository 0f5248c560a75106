"""fd: the kinds of descriptors, and their ownership."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corefw_transport_exec import FdTransport

from corefw.channel import Interrupt, TransportContext
from corefw.errors import ChannelError, UriError
from corefw.net import descriptors
from corefw.uri import MigrationUri

NEVER = Interrupt()
"""An interrupt that is never set."""


def fd_(what: int | str) -> FdTransport:
    """The number of a descriptor as if the process had inherited it."""
    if isinstance(what, int):
        os.set_inheritable(what, True)
    return FdTransport(MigrationUri("fd", str(what)), TransportContext())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            continue


def test_a_number_is_used_and_closed(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    transport = fd_(writer)
    with transport.connect(NEVER) as channel:
        channel.send(b"x")
    assert os.read(reader, 10) == b"x"
    assert os.read(reader, 10) == b""
    with pytest.raises(ChannelError, match="already been used"):
        transport.connect(NEVER)


def test_what_the_process_opened_itself_is_not_given_away(pipe: tuple[int, int]) -> None:
    """Otherwise a mistyped number could take the guest's own connection."""
    for fd in pipe:
        with pytest.raises(UriError, match=f"'fd:{fd}': descriptor {fd} is this process's own"):
            fd_(str(fd))
        os.fstat(fd)


def test_a_name_is_taken_when_it_is_used(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    descriptors.put("migration", writer)
    fd_("migration")
    assert descriptors.peek("migration") == writer
    fd_("migration").connect(NEVER).close()
    assert descriptors.peek("migration") is None
    with pytest.raises(UriError, match="no descriptor is called 'migration'"):
        fd_("migration")


def test_features_are_known_before_anything_is_sent(pipe: tuple[int, int], tmp_path: Path) -> None:
    reader, writer = pipe
    one, other = socket.socketpair()
    with one, other, (tmp_path / "file").open("w+b") as file:
        shown = [
            (features.return_path, features.incoming, features.outgoing)
            for features in (fd_(fd).features for fd in (reader, writer, one.fileno(), file.fileno()))
        ]
    assert shown == [(False, True, False), (False, False, True), (True, True, True), (False, True, True)]


def test_the_wrong_way(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    with pytest.raises(ChannelError, match="open for reading only"):
        fd_(reader).connect(NEVER)
    with pytest.raises(ChannelError, match="open for writing only"):
        fd_(writer).listen()
    with fd_(writer).connect(NEVER) as channel, pytest.raises(ChannelError, match="one-way"):
        channel.receive_into(memoryview(bytearray(1)))


def datagram() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (datagram, "expected a stream socket"),
        (listening, "expected a connected socket"),
        (Interrupt, "not a socket, pipe or file"),
    ],
)
def test_kinds_that_are_no_streams(make: Callable[[], socket.socket | Interrupt], expected: str) -> None:
    thing = make()
    try:
        with pytest.raises(UriError, match=expected):
            fd_(thing.fileno())
    finally:
        thing.close()


def test_an_inherited_descriptor_works_in_another_process(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    script = (
        "import sys\n"
        "from corefw_transport_exec import FdTransport; from corefw.channel import Interrupt, TransportContext\n"
        "from corefw.uri import MigrationUri\n"
        "with FdTransport(MigrationUri('fd', sys.argv[1]), TransportContext()).connect(Interrupt()) as channel:\n"
        "    channel.send(b'inherited'); channel.send_eof()\n"
    )
    subprocess.run([sys.executable, "-c", script, str(writer)], pass_fds=[writer], check=True)
    assert os.read(reader, 100) == b"inherited"


def test_standard_output_keeps_its_number() -> None:
    """A file that is opened later must not become the standard output."""
    script = (
        "import os\n"
        "from corefw_transport_exec import FdTransport; from corefw.channel import Interrupt, TransportContext\n"
        "from corefw.uri import MigrationUri\n"
        "with FdTransport(MigrationUri('fd', '1'), TransportContext()).connect(Interrupt()) as channel:\n"
        "    channel.send(b'stream'); channel.send_eof()\n"
        "assert os.open('/dev/zero', os.O_RDONLY) > 2\n"
        "print('not in the stream')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"stream", b"")


def test_the_open_file_of_others_blocks_again(pipe: tuple[int, int]) -> None:
    """All processes that have the pipe open share the flag O_NONBLOCK, so it is restored."""
    _, writer = pipe
    copy = os.dup(writer)
    fd_(writer).connect(NEVER).close()
    assert os.get_blocking(copy)
    os.close(copy)
