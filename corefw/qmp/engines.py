"""Find an engine and talk to it over QMP; claim the name of a new engine.

Every command reaches its engine, migfw's own or a real QEMU, through `connect`. A command that the engine refused
changed nothing (UsageError, exit status 2); a command that was tried and failed is a failure (status 1).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from corefw.closing import Closing
from corefw.errors import ChannelError, MigfwError, UsageError
from corefw.machine import RunState
from corefw.net.socketfile import Occupant, make_room, occupant
from corefw.net.sockets import reason
from corefw.qmp.address import QmpAddress, named_address, parse_address, resolve
from corefw.qmp.client import QmpClient, QmpError
from corefw.states import POSTCOPY, MigrationStatus
from corefw.uri import UnixAddress

POLL: Final = 0.1
"""Seconds between two polls of a migration."""

_SETTLE: Final = 5.0

_TRIED: Final = frozenset({"stop", "cont", "x-migfw-verify"})
"""Commands whose error is a failure, not a refusal."""

_UNDER_WAY: Final = frozenset(
    {
        MigrationStatus.SETUP,
        MigrationStatus.ACTIVE,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
        MigrationStatus.CANCELLING,
        MigrationStatus.POSTCOPY_ACTIVE,
        MigrationStatus.POSTCOPY_RECOVER_SETUP,
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
        """Execute a command.

        Raises UsageError if it was refused, MigfwError if it failed, ChannelError if the engine has gone.
        """
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
        """The run state, once a guest whose migration failed or was cancelled has been started again."""
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

    def outgoing_status(self) -> str:
        """The status of the migration away from the engine. A real QEMU does not say in which direction one goes."""
        if self.is_migfw:
            return str(self.call("x-migfw-status")["outgoing"])
        return self.migration_status()

    def has_part_of_guest(self) -> bool:
        """Whether the guest is in postcopy, so that it is lost if this engine ends."""
        if self.is_migfw:
            return bool(self.call("x-migfw-status")["has-part-of-guest"])
        return self.migration_status() in POSTCOPY

    def capabilities(self) -> frozenset[str]:
        """The names of all its capabilities."""
        return frozenset(entry["capability"] for entry in self.call("query-migrate-capabilities"))

    def quit(self, seconds: float) -> bool:
        """End the engine, and wait until its process has ended, or on another host until it has hung up. Returns False
        if it has not after `seconds`. Raises UsageError, ChannelError."""
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as stack:
            process = stack.enter_context(_process_of(self.client))
            self.call("quit")
            try:
                for _ in self.client.events(seconds):
                    pass
            except ChannelError:
                return process is None or bool(process.poll(max(0.0, deadline - time.monotonic()) * 1000))
        return False

    def wait_idle(self) -> str:
        """Wait until no migration is under way, and return its status."""
        while (status := self.migration_status()) in _UNDER_WAY:
            time.sleep(POLL)
        return status


@contextlib.contextmanager
def _process_of(client: QmpClient) -> Iterator[select.poll | None]:
    """Poll for the end of the process at the other end; None if it cannot be seen from here."""
    pid = client.server_process()
    try:
        fd = os.pidfd_open(pid) if pid is not None else -1
    except OSError:
        fd = -1
    if fd < 0:
        yield None
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        yield poll
    finally:
        os.close(fd)


@contextlib.contextmanager
def connect(name: str | None, qmp: str | None) -> Iterator[EngineClient]:
    """Connect to the engine with this name, at this address, or the only one running. Raises UsageError."""
    if name is not None and qmp is not None:
        raise UsageError("--name and --qmp both name an engine: use one of them")
    address = resolve(name, qmp)
    try:
        client = QmpClient(address)
    except ChannelError as error:
        raise UsageError(str(error)) from None
    with client:
        yield EngineClient(client)


# -- the name of a new engine ------------------------------------------------------------------------------------------


_LONGEST: Final = 40
"""Characters of a generated name; one given by --name may be longer."""


class Claim(Closing):
    """The name and the QMP address of an engine that is about to start.

    While it is open, no other engine of this user gets the name. Close it once the QMP socket exists: from then on
    the socket shows that the name is taken.
    """

    def __init__(self, name: str, address: QmpAddress, lock: tuple[Path, int] | None = None) -> None:
        self.name: Final = name
        self.address: Final = address
        self._lock = lock

    def close(self) -> None:
        """Idempotent; does not raise."""
        if self._lock is not None:
            path, fd = self._lock
            self._lock = None
            with contextlib.suppress(OSError):
                path.unlink()  # before unlocking: the next one to lock it sees that the file has been unlinked
            os.close(fd)


def claim(name: str | None, qmp: str | None, program: str) -> Claim:
    """Claim a name and an address for a new engine.

    What was given must be free; a name derived from `program` gets a number if it is taken. Raises UsageError.
    """
    if qmp is not None:
        address = parse_address(qmp)
        if isinstance(address, UnixAddress):
            try:
                make_room(Path(address.path))
            except OSError as error:
                raise UsageError(f"cannot listen at '{address}': {reason(error)}") from None
        return Claim(suggest(program) if name is None else name, address)
    if name is not None:
        claimed = _claim(name)
        if claimed is None:
            raise UsageError(
                f"an engine named '{name}' is already running: choose another --name, or end it with 'migfw quit'"
            )
        return claimed
    suggested, number = suggest(program), 1
    while (claimed := _claim(suggested if number == 1 else f"{suggested}-{number}")) is None:
        number += 1
    return claimed


def _claim(name: str) -> Claim | None:
    """Claim this name; None if it is taken. Raises UsageError if it is not valid or cannot be claimed."""
    address = named_address(name)
    socket = Path(address.path)
    try:
        fd = _lock(socket.with_suffix(".lock"))
        if fd is None:
            return None
        claimed = Claim(name, address, (socket.with_suffix(".lock"), fd))
        # Look only now: an engine that held the lock until a moment ago has created its socket.
        found = occupant(socket)
        if found is Occupant.NOBODY:
            return claimed
        claimed.close()
        if found is Occupant.LISTENER:
            return None
        make_room(socket)
    except OSError as error:
        raise UsageError(f"cannot listen at '{address}': {reason(error)}") from None
    return _claim(name)


def _lock(path: Path) -> int | None:
    """Create the file if necessary and lock it: its descriptor, or None if another process has it. Raises OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.lstat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its owner removed it in between


def suggest(program: str) -> str:
    """Derive a name from a program: "sims/heat.py:Heat" gives "heat", "package.module:Class" gives "class"."""
    path, _, attribute = program.partition(":")
    word = Path(path).stem if path.endswith(".py") else (attribute or path)
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:_LONGEST] or "guest"
