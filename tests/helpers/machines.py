"""A small machine for tests of the engine: real RAM in memfds, a guest that is a thread of this process, one device.

The guest adds 1 to a counter in a page of its RAM and to `writes` in its device. Invariant: while it is stopped, the
sum of the counters is `writes`, so a lost page shows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from corefw.errors import MachineError
from corefw.machine import Device, Machine, RunState
from corefw.memory.blocks import MemfdBlock
from corefw.memory.hashes import HashLog
from corefw.wire.vmstate import Kind, Scalar, VMState

PAGE = 4096

COUNTER = VMState("counter", version_id=2, minimum_version_id=2, fields=(Scalar("writes", Kind.U64),))


@dataclass
class CounterState:
    writes: int = 0


class CountingMachine(Machine):
    """A machine with `pages` pages of RAM. While it runs, the guest writes to another page every `pause` seconds."""

    kind = "counting"

    def __init__(
        self,
        pages: int = 64,
        *,
        incoming: bool = False,
        name: str = "counting",
        table: VMState = COUNTER,
        block: str = "counters",
        pause: float = 0.0005,
        instances: int = 1,
    ) -> None:
        self._name = name
        self._table = table
        self._pause = pause
        self._instances = instances
        self.state = CounterState()
        self.block = MemfdBlock(block, pages * PAGE)
        self.block.dirty_log = HashLog(self.block)
        self._run_state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self._observers: list[Callable[[RunState, RunState], None]] = []
        self._ticking = threading.Event()
        self._between = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._guest, name="guest", daemon=True)
        self._thread.start()
        self.starts = 0

    def _guest(self) -> None:
        counters = self.block.view.cast("Q")
        step = 0
        while not self._closed:
            self._ticking.wait()
            with self._between:
                if self._ticking.is_set() and not self._closed:
                    step += 7919
                    counters[step % (len(counters) * 8 // PAGE) * (PAGE // 8)] += 1
                    self.state.writes += 1
            threading.Event().wait(self._pause)
        counters.release()

    # -- Machine ---------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name

    @property
    def run_state(self) -> RunState:
        return self._run_state

    def ram_blocks(self) -> Sequence[MemfdBlock]:
        return [self.block]

    def devices(self) -> Sequence[Device]:
        return [Device("counter", number, self._table, self.state) for number in range(self._instances)]

    def start(self) -> None:
        self.starts += 1
        self._ticking.set()
        self.set_run_state(RunState.RUNNING)

    def stop(self, state: RunState) -> None:
        self._ticking.clear()
        with self._between:
            pass
        self.set_run_state(state)

    def set_run_state(self, state: RunState) -> None:
        old, self._run_state = self._run_state, state
        for observer in self._observers:
            observer(old, state)

    def watch(self, observer: Callable[[RunState, RunState], None]) -> None:
        self._observers.append(observer)

    def information(self) -> Mapping[str, object]:
        return {"ram": {self.block.idstr: self.block.length}}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._ticking.set()
        self._thread.join()
        self.block.close()

    # -- for the tests ---------------------------------------------------------------------------------------------

    def check(self) -> int:
        """The number of writes. Raises MachineError if RAM and device differ. The guest must be stopped."""
        counted = int(np.frombuffer(self.block.view, dtype=np.uint64)[:: PAGE // 8].sum())
        if counted != self.state.writes:
            raise MachineError(f"{self.state.writes} writes were counted and {counted} found")
        return counted

    def die(self) -> None:
        """Behave like a guest whose process has ended."""
        self._ticking.clear()
        self.set_run_state(RunState.INTERNAL_ERROR)
