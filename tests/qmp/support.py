"""A guest without memory or devices, and a client that talks to a server byte by byte."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from corefw.errors import MachineError
from corefw.machine import Device, RamBlock, RunState, VerifiableMachine
from corefw.uri import UnixAddress
from tests.helpers.engines import PATIENCE

Watcher = Callable[[RunState, RunState], None]


class TinyMachine(VerifiableMachine):
    """A minimal machine: it only changes its run state."""

    kind = "tiny"

    def __init__(self, *, incoming: bool = False) -> None:
        self._state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self._watchers: list[Watcher] = []
        self.broken = ""

    @property
    def name(self) -> str:
        return "tiny-1.0"

    @property
    def run_state(self) -> RunState:
        return self._state

    def ram_blocks(self) -> Sequence[RamBlock]:
        return ()

    def devices(self) -> Sequence[Device]:
        return ()

    def start(self) -> None:
        self.set_run_state(RunState.RUNNING)

    def stop(self, state: RunState) -> None:
        self.set_run_state(state)

    def set_run_state(self, state: RunState) -> None:
        old, self._state = self._state, state
        if old is not state:
            for watcher in self._watchers:
                watcher(old, state)

    def watch(self, observer: Watcher) -> None:
        self._watchers.append(observer)

    def information(self) -> Mapping[str, object]:
        return {"ram": {}}

    def verify(self) -> Mapping[str, object]:
        if self.broken:
            raise MachineError(self.broken)
        return {"writes": 7}

    def close(self) -> None:
        pass


class RawClient:
    """A client that sends and receives bytes."""

    def __init__(self, path: str | Path, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self._file = self.socket.makefile("rb")
        self.socket.settimeout(PATIENCE)
        try:
            self.socket.connect(str(path))
            self.greeting = self.read()
            if negotiate:
                assert self.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}
        except BaseException:
            self.close()
            raise

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> dict[str, object]:
        line = self._file.readline()
        if not line:
            raise EOFError
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def rest(self) -> list[dict[str, object]]:
        """Close the sending direction; return everything that still arrives."""
        self.socket.shutdown(socket.SHUT_WR)
        return [json.loads(line) for line in self._file]

    def ask(self, data: bytes) -> dict[str, object]:
        self.send(data)
        return self.read()

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def path_of(address: object) -> str:
    assert isinstance(address, UnixAddress)
    return address.path


def errors(messages: Sequence[Mapping[str, object]]) -> list[object]:
    return [message.get("error") for message in messages]
