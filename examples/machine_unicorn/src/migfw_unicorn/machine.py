"""UnicornMachine: RAM in a memfd, the CPU in a thread of the engine's process.

The memfd is mapped twice. The emulator runs on a mapping of its own, which the dirty log watches; the engine uses the
other one. So what the engine loads never looks like a write of the guest. The log has every write of the guest: the
emulator's compiled code stores into its mapping, and the kernel marks the page.

While it emulates, unicorn holds no Python lock, so the guest computes while the engine sends.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from corefw.errors import MachineError, UsageError
from corefw.machine import DEAD, Device, MachineConfig, RamBlock, RunState, VerifiableMachine
from corefw.memory.blocks import MemfdBlock
from corefw.memory.logs import best_dirty_log
from corefw.memory.pagemap import open_tracker, unsupported
from corefw.quantities import parse_size
from migfw_unicorn import program
from migfw_unicorn.emulator import Emulator
from migfw_unicorn.registers import CPU, Registers

LEAST_RAM: Final = 64 << 10


class UnicornMachine(VerifiableMachine):
    """See corefw.machine.Machine. Raises UsageError for a wrong option."""

    kind = "unicorn"
    name = "unicorn-x86-64"

    def __init__(self, config: MachineConfig) -> None:
        length = _ram_length(config)
        self._run_state = RunState.INMIGRATE if config.incoming else RunState.PRELAUNCH
        self._observers: list[Callable[[RunState, RunState], None]] = []
        self._changing = threading.Lock()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: MachineError | None = None
        self._block = MemfdBlock("ram", length)
        self._mapping = mmap.mmap(self._block.fd, length)
        self._memory = np.frombuffer(self._mapping, dtype=np.uint8)
        address = self._memory.ctypes.data
        self._emulator: Emulator | None = Emulator(program.BASE, length, address)
        reason = unsupported()
        self._tracker = None if reason else open_tracker()
        self._block.dirty_log = best_dirty_log(self._block, self._tracker, address, reason or "")
        self._registers = Registers()
        if not config.incoming:
            self._registers = program.first_registers(length)
            self._block.view[: len(program.CODE)] = program.CODE

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def run_state(self) -> RunState:
        return self._run_state

    def ram_blocks(self) -> Sequence[RamBlock]:
        return (self._block,)

    def devices(self) -> Sequence[Device]:
        return (Device("cpu", 0, CPU, self._registers),)

    def information(self) -> Mapping[str, object]:
        error = {"error": str(self._error)} if self._error is not None else {}
        return {"ram": {self._block.idstr: self._block.length}, **error}

    def verify(self) -> Mapping[str, object]:
        """Check every counter in RAM against the registers. A running guest is stopped meanwhile."""
        runs = self._run_state is RunState.RUNNING
        if runs:
            self._hold()
        try:
            return program.verify(self._block.view, self._registers)
        finally:
            if runs:
                self._let_run()

    # -- run states ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        if self._emulator is None:
            raise MachineError("the machine is closed")
        if self._run_state in DEAD:
            raise self._ended()
        if self._run_state is not RunState.RUNNING:
            self._let_run()
            self._change(RunState.RUNNING)

    def stop(self, state: RunState) -> None:
        if self._run_state is RunState.RUNNING:
            self._hold()
        if self._run_state in DEAD:
            raise self._ended()
        self._change(state)

    def set_run_state(self, state: RunState) -> None:
        if self._thread is not None:
            raise MachineError(f"the guest is running: stop it before its state becomes '{state}'")
        self._change(state)

    def watch(self, observer: Callable[[RunState, RunState], None]) -> None:
        self._observers.append(observer)

    def _change(self, new: RunState) -> None:
        """Change the run state, unless the guest has ended."""
        with self._changing:
            old = self._run_state
            if old is new or old in DEAD:
                return
            self._run_state = new
        for observer in list(self._observers):
            observer(old, new)

    # -- the CPU -------------------------------------------------------------------------------------------------------

    def _let_run(self) -> None:
        assert self._emulator is not None
        self._emulator.load(self._registers)
        self._wanted.set()
        self._thread = threading.Thread(target=self._run, args=(self._emulator,), name="unicorn", daemon=True)
        self._thread.start()

    def _hold(self) -> None:
        """Stop the CPU and wait until the device has its registers."""
        self._wanted.clear()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._emulator is not None:
            self._emulator.save(self._registers)

    def _run(self, emulator: Emulator) -> None:
        try:
            while self._wanted.is_set():
                emulator.run_slice()
        except MachineError as error:
            self._error = error
            self._change(RunState.INTERNAL_ERROR)

    def _ended(self) -> MachineError:
        return MachineError(f"the guest has ended{f': {self._error}' if self._error else ''}")

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._emulator is None:
            return
        self._hold()
        self._change(RunState.SHUTDOWN)
        self._emulator = None  # before its memory goes
        self._memory = np.empty(0, dtype=np.uint8)
        self._block.close()
        self._mapping.close()
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None


def _ram_length(config: MachineConfig) -> int:
    """The only option. Raises UsageError."""
    if config.program is not None:
        raise UsageError(f"a unicorn machine runs its own program, not '{config.program}'")
    if config.allow_undeclared:
        raise UsageError("a unicorn machine has no undeclared state")
    options = {"ram": "4M", **config.options}
    if wrong := options.keys() - {"ram"}:
        raise UsageError(f"a unicorn machine has no option '{min(wrong)}' (its options: ram)")
    length = parse_size(options["ram"])
    if length < LEAST_RAM or length & (length - 1):
        raise UsageError(f"option 'ram' is a power of two of at least 64K, got {options['ram']}")
    return length
