"""Abstract UNIX sockets have no mode to keep other users out: listeners check their peers (with real processes)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from corefw.channel import Channel, Interrupt, Listener, receive_exactly
from corefw.plugins import Plugins
from tests.helpers.cli import start

NOBODY = 65534
PLUGINS = Plugins()

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")

DIAL = """
import os, sys
from corefw.channel import Interrupt
from corefw.errors import MigfwError
from corefw.plugins import Plugins

transport = Plugins().transport(sys.argv[1])
os.setgroups([])
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[2])] * 3)
try:
    channel = transport.connect(Interrupt())
    channel.send(sys.argv[2].encode().rjust(5))
    channel.send_eof()
    channel.receive_into(memoryview(bytearray(1)))
except MigfwError as error:
    print(error)
"""


class Server:
    """Accepts one connection in a thread; `first` is the first data that its peer sent."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._interrupt = Interrupt()
        self.first = b""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._listener.accept(self._interrupt) as channel:
            self.first = _read(channel)

    def wait(self) -> bytes:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.first

    def stop(self) -> None:
        if self._thread.is_alive():
            self._interrupt.set()
        self._thread.join()


def _read(channel: Channel) -> bytes:
    room = bytearray(5)
    receive_exactly(channel, memoryview(room))
    return bytes(room).strip()


def dial(uri: str, uid: int) -> str:
    """Dial as another user; return the error."""
    done = subprocess.run(
        [sys.executable, "-c", DIAL, uri, str(uid)], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


@pytest.mark.parametrize("scheme", ["unix:", "zmq:ipc://"])
def test_only_this_user_and_root_reach_an_abstract_socket(scheme: str) -> None:
    uri = f"{scheme}@migfw-test-{os.getpid()}-mine"
    with PLUGINS.transport(uri).listen() as listener:
        server = Server(listener)
        try:
            assert dial(uri, NOBODY), "another user found nothing wrong"
            assert dial(uri, 0) == ""
            assert server.wait() == b"0"
        finally:
            server.stop()


@pytest.mark.parametrize("scheme", ["unix:", "zmq:ipc://"])
def test_everybody_may_where_that_was_asked_for(scheme: str) -> None:
    uri = f"{scheme}@migfw-test-{os.getpid()}-any"
    settings = PLUGINS.settings()
    settings.set_property("allow-any-user", True)
    with PLUGINS.transport(uri, settings).listen() as listener:
        server = Server(listener)
        try:
            assert dial(uri, NOBODY) == ""
            assert server.wait() == str(NOBODY).encode()
        finally:
            server.stop()


def test_a_relay_takes_nobody_else_in(tmp_path: Path) -> None:
    uri = f"unix:@migfw-test-{os.getpid()}-relay"
    relay = start("relay", uri, f"file:{tmp_path}/out")
    assert relay.stdout
    assert relay.stdout.readline().startswith("listening at ")
    dial(uri, NOBODY)
    dial(uri, 0)
    relay.finish()
    assert (tmp_path / "out").read_bytes() == b"    0"
