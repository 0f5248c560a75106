"""A python guest that moves in postcopy between two engines in one process."""

from __future__ import annotations

import os

from corefw.engine import Engine
from corefw.machine import MachineConfig, RunState
from corefw.testing.tasks import wait_until
from corefw.wire.constants import Command, SectionType
from tests.helpers.engines import Pair, Peer, arrived, ended

LISTEN = f"tcp:127.{os.getpid() >> 16 & 63 | 64}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}:0"
"""A loopback address that only this process uses, so that no other process takes a port that it will use again."""
SLOW = 2 << 20
"""Bytes per second: the RAM takes long enough for a test to interfere, also on a busy machine."""
PACKAGED = bytes((SectionType.COMMAND, 0, Command.PACKAGED, 0, 4))
LEISURELY = ("24M", "3M")
"""Working set and dirty rate of a guest that needs pages for a while, faster than the background stream sends them."""


class Move:
    """A guest that writes faster than its pages are sent, on its way from a source to a destination."""

    def __init__(self, pair: Pair, working_set: str = "8M", dirty_rate: str = "400M") -> None:
        options = {"ram": "32M", "working-set": working_set, "dirty-rate": dirty_rate}
        self.source, self.destination = (self._engine(pair, options, incoming) for incoming in (False, True))
        self.source.cont()

    def _engine(self, pair: Pair, options: dict[str, str], incoming: bool) -> Engine:
        engine = pair.engine(pair.plugins.machine("python", MachineConfig("stress", options, incoming)), {})
        engine.settings.set_capabilities({"postcopy-ram": True})
        return engine

    def limit(self, precopy: int = SLOW) -> None:
        self.source.set_parameters({"max-bandwidth": precopy, "max-postcopy-bandwidth": SLOW})

    def begin(self, precopy: int = SLOW) -> None:
        """Start to migrate with this limit."""
        self.limit(precopy)
        self.source.migrate(self.destination.migrate_incoming(LISTEN))

    def hand_over(self) -> None:
        """Begin, and switch to postcopy. The guest may need pages before it runs."""
        self.begin()
        self.source.start_postcopy()
        self.both_reach("postcopy-active")

    def switch(self) -> None:
        """Hand over, and wait until the guest runs on the destination."""
        self.hand_over()
        assert wait_until(lambda: self.destination.machine.run_state is RunState.RUNNING), "it waits for a page"

    def hand_over_to(self, peer: Peer) -> bytes:
        """Let the source send its package to a destination driven by the test; return the bytes from the package on."""
        self.limit()
        self.source.migrate(peer.uri)
        self.source.start_postcopy()
        peer.accept()
        data = peer.read_all(lambda data: PACKAGED in data)
        return data[data.index(PACKAGED) :]

    def reaches(self, engine: Engine, status: str) -> None:
        machine = engine.outgoing if engine is self.source else engine.incoming
        assert wait_until(lambda: machine.status == status), f"{machine.side}: {machine.status}, not {status}"

    def both_reach(self, status: str) -> None:
        self.reaches(self.source, status)
        self.reaches(self.destination, status)

    def pause(self) -> None:
        """Break the connection on purpose."""
        self.source.pause_migration()
        self.both_reach("postcopy-paused")

    def recover(self) -> None:
        """Let the destination listen elsewhere, and the source connect there."""
        self.source.migrate(self.destination.recover(LISTEN), resume=True)

    def hurry(self) -> None:
        self.source.set_parameters({"max-postcopy-bandwidth": 0})

    def completes(self) -> None:
        """Check that the guest arrives complete, and runs only on the destination."""
        assert ended(self.source) == "completed", self.source.report().error
        assert arrived(self.destination) == "completed", self.destination.report().error
        assert self.source.machine.run_state is RunState.POSTMIGRATE
        assert self.destination.machine.run_state is RunState.RUNNING
        before = int(str(self.destination.verify()["writes"]))
        assert wait_until(lambda: int(str(self.destination.verify()["writes"])) > before), "the guest stands still"
