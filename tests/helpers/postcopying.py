"""Postcopy between a real QEMU and a parked machine, in either direction."""

from __future__ import annotations

import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from corefw.engine import Engine
from corefw.net import descriptors
from corefw.states import MigrationStatus
from tests.helpers.engines import query_migrate
from tests.helpers.parking import PATIENCE, parking, prove, wait_parked, wait_status
from tests.helpers.qemu import Guest, Qemu, wait_until

LISTEN = "tcp:127.0.0.1:0"
SLOW = 1 << 20
"""Bytes per second until finish(). Slow enough that the guest (tests/helpers/guest.asm) needs the second MiB of its RAM
before it arrives, even if QEMU takes a second to start it."""


class Move(ABC):
    """A migration in one of the two directions. `stranger` is a socket that does not lead to the other side."""

    def __init__(self, qemu: Qemu, engine: Engine, capabilities: Sequence[str] = ()) -> None:
        self.qemu, self.engine = qemu, engine
        self.capabilities = ("postcopy-ram", *capabilities)
        engine.set_capabilities(dict.fromkeys(self.capabilities, True))

    def complete(self) -> None:
        """Move without interruption."""
        self.begin(self.listen())
        self.both_reach("postcopy-active")
        self.finish()

    @abstractmethod
    def listen(self) -> str:
        """Let the destination listen; return the URI for begin()."""

    @abstractmethod
    def begin(self, uri: str) -> None:
        """Switch to postcopy as soon as possible."""

    @abstractmethod
    def both_reach(self, status: str) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Send the rest without a limit, and wait until both sides complete."""

    @abstractmethod
    def listen_again(self) -> str: ...

    @abstractmethod
    def listen_at(self, stranger: socket.socket) -> None: ...

    @abstractmethod
    def resume(self, uri: str) -> None: ...

    @abstractmethod
    def resume_over(self, stranger: socket.socket) -> None: ...

    @abstractmethod
    def await_failure(self) -> None:
        """Wait until the resume has failed."""

    def pause(self) -> None:
        """Pause both sides on purpose."""
        self.engine.pause_migration()
        self.qemu.urgent("migrate-pause")

    def _lend(self, stranger: socket.socket) -> None:
        self.qemu.command("getfd", fdname="stranger", fd=stranger.fileno())
        stranger.close()


class IntoMigfw(Move):
    """A QEMU's machine that is parked."""

    def listen(self) -> str:
        return self.engine.migrate_incoming(LISTEN)

    def begin(self, uri: str) -> None:
        self.qemu.capabilities(*self.capabilities)
        self.qemu.command("migrate-set-parameters", max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
        self.qemu.command("migrate", uri=uri)
        self.qemu.command("migrate-start-postcopy")

    def both_reach(self, status: str) -> None:
        wait_until(lambda: self.qemu.status() == status, f"QEMU to be {status}")
        wait_status(self.engine, status, incoming=True)

    def finish(self) -> None:
        self.qemu.command("migrate-set-parameters", max_postcopy_bandwidth=0)
        wait_parked(self.engine)
        self.qemu.wait_migrated()

    def listen_again(self) -> str:
        return self.engine.recover(LISTEN)

    def listen_at(self, stranger: socket.socket) -> None:
        descriptors.put("stranger", stranger.detach())
        self.engine.recover("fd:stranger")

    def resume(self, uri: str) -> None:
        self.qemu.command("migrate", uri=uri, resume=True)

    def resume_over(self, stranger: socket.socket) -> None:
        self._lend(stranger)
        self.resume("fd:stranger")  # when this returns, the status is another one

    def await_failure(self) -> None:
        self.both_reach("postcopy-paused")


class OutOfMigfw(Move):
    """A parked machine that wakes up in a QEMU."""

    def listen(self) -> str:
        self.qemu.capabilities(*self.capabilities)
        return self.qemu.listen()

    def begin(self, uri: str) -> None:
        self.engine.set_parameters({"max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOW})
        self.engine.migrate(uri)
        self.engine.start_postcopy()

    def both_reach(self, status: str) -> None:
        wait_status(self.engine, status)
        wait_until(lambda: self.qemu.status() == status, f"QEMU to be {status}")

    def finish(self) -> None:
        self.qemu.wait_running()
        wait_until(lambda: query_migrate(self.engine)["ram"]["postcopy-requests"] > 0, "a page request")
        self.hurry()
        self.completes()

    def hurry(self) -> None:
        """Lift the bandwidth limit."""
        self.engine.set_parameters({"max-postcopy-bandwidth": 0})

    def completes(self) -> None:
        assert self.engine.wait_outgoing(PATIENCE) is MigrationStatus.COMPLETED, query_migrate(self.engine)

    def listen_again(self) -> str:
        return self.qemu.listen_again()

    def listen_at(self, stranger: socket.socket) -> None:
        self._lend(stranger)
        self.qemu.urgent("migrate-recover", uri="fd:stranger")

    def resume(self, uri: str) -> None:
        self.engine.migrate(uri, resume=True)

    def resume_over(self, stranger: socket.socket) -> None:
        descriptors.put("stranger", stranger.detach())
        self.resume("fd:stranger")

    def await_failure(self) -> None:
        wait_until(lambda: "fd:stranger" in (self.engine.report().error or ""), "the resume to fail")
        self.both_reach("postcopy-paused")


@contextlib.contextmanager
def there_and_back(
    guest: Guest, *capabilities: str, arguments: Sequence[str] = ()
) -> Iterator[tuple[IntoMigfw, OutOfMigfw]]:
    """Move from a QEMU into migfw, and from there into another QEMU; check that the guest continues after the block."""
    with (
        Qemu(*arguments, boot=guest.image, out_of_band=True) as source,
        parking() as engine,
        Qemu(*arguments, boot=guest.image, incoming="defer", out_of_band=True) as destination,
    ):
        source.wait_printed("B")
        yield IntoMigfw(source, engine, capabilities), OutOfMigfw(destination, engine, capabilities)
        prove(guest, destination)
