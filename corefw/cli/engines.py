"""The engine that a command talks to, over QMP: migfw's own, or a real QEMU.

The law: every command reaches its engine through here, so that it is found and asked in one way only. A command that
the engine refused changed nothing (UsageError, exit status 2); one that was tried and failed is a failure (status 1).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

from corefw.errors import ChannelError, MigfwError, UsageError
from corefw.machine import RunState
from corefw.qmp.address import resolve
from corefw.qmp.client import QmpClient, QmpError
from corefw.states import MigrationStatus

POLL: Final = 0.1
"""Seconds between two looks at a migration."""

_SETTLE: Final = 5.0

_TRIED: Final = frozenset({"stop", "cont", "x-migfw-verify"})
"""Commands that try something: their error is a failure, not a refusal."""

_UNDER_WAY: Final = frozenset(
    {
        MigrationStatus.SETUP,
        MigrationStatus.ACTIVE,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
        MigrationStatus.CANCELLING,
        MigrationStatus.POSTCOPY_ACTIVE,
        MigrationStatus.POSTCOPY_RECOVER,
        "wait-unplug",  # QEMU's own
    }
)


class EngineClient:
    """A connection to one engine. `is_migfw` is False for a real QEMU."""

    def __init__(self, client: QmpClient) -> None:
        self.client: Final = client
        self.address: Final = str(client.address)
        self.commands: Final = frozenset(entry["name"] for entry in client.execute("query-commands"))
        self.is_migfw: Final = "x-migfw-status" in self.commands

    def call(self, command: str, **arguments: object) -> Any:
        """Execute a command. Raises UsageError (refused), MigfwError (it failed), ChannelError (the engine is gone)."""
        if command not in self.commands:
            raise UsageError(f"the engine at {self.address} has no command '{command}'")
        try:
            return self.client.execute(command, arguments)
        except QmpError as error:
            raise (MigfwError if command in _TRIED else UsageError)(str(error)) from None

    def run_state(self) -> str:
        state: str = self.call("query-status")["status"]
        return state

    def settled_run_state(self) -> str:
        """The run state, once a guest whose migration failed or was cancelled has been let go again."""
        end = time.monotonic() + _SETTLE
        while (state := self.run_state()) == RunState.FINISH_MIGRATE and time.monotonic() < end:
            time.sleep(POLL)
        return state

    def query_migrate(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("query-migrate")
        return answer

    def migration_status(self) -> str:
        status: str = self.query_migrate().get("status", "none")
        return status

    def is_migrating(self) -> bool:
        return self.migration_status() in _UNDER_WAY

    def capabilities(self) -> frozenset[str]:
        """The names of all that it knows."""
        return frozenset(entry["capability"] for entry in self.call("query-migrate-capabilities"))

    def wait_end(self, seconds: float) -> bool:
        """Wait until it is gone; False when it still answers after `seconds`."""
        try:
            for _ in self.client.events(seconds):
                pass
        except ChannelError:
            return True
        return False

    def wait_idle(self) -> str:
        """Wait until no migration is under way; the status then."""
        while (status := self.migration_status()) in _UNDER_WAY:
            time.sleep(POLL)
        return status


@contextlib.contextmanager
def connect(name: str | None, qmp: str | None) -> Iterator[EngineClient]:
    """The engine with this name, at this address, or the only one that runs. Raises UsageError when there is none."""
    if name is not None and qmp is not None:
        raise UsageError("--name and --qmp both name an engine: use one of them")
    address = resolve(name, qmp)
    try:
        client = QmpClient(address)
    except ChannelError as error:
        raise UsageError(str(error)) from None
    with client:
        yield EngineClient(client)
