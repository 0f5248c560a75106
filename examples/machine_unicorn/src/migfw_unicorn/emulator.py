"""The CPU: as much of unicorn as the machine needs.

Unicorn can be stopped by another thread or by a timeout of its own, but not precisely: an instruction that writes to
memory may then be executed once more when the CPU goes on (2.1.4). A stop after a number of instructions is exact, so
the CPU runs in slices.
"""

from __future__ import annotations

from typing import Final

from unicorn import UC_ARCH_X86, UC_MODE_64, UC_PROT_ALL, Uc, UcError
from unicorn.x86_const import UC_X86_REG_RIP

from corefw.errors import MachineError
from migfw_unicorn.registers import NUMBERS, Registers

SLICE: Final = 200_000
"""Instructions; some 20 ms."""


class Emulator:
    """An x86-64 CPU with one piece of RAM: `length` bytes at `base`, which are those at `address` in this process."""

    def __init__(self, base: int, length: int, address: int) -> None:
        self._end = base + length
        self._uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self._uc.mem_map_ptr(base, length, UC_PROT_ALL, address)

    def run_slice(self) -> None:
        """Go on where the CPU stands. Holds no Python lock meanwhile. Raises MachineError, for good."""
        try:
            self._uc.emu_start(self._uc.reg_read(UC_X86_REG_RIP), self._end, count=SLICE)
        except UcError as error:  # a jump or an access to where there is no RAM
            raise MachineError(f"the CPU has stopped: {error}") from None

    def load(self, registers: Registers) -> None:
        """Continue from here. What is in RAM now counts, and not what was compiled from it earlier."""
        for name, number in NUMBERS.items():
            self._uc.reg_write(number, getattr(registers, name))
        self._uc.ctl_flush_tb()

    def save(self, registers: Registers) -> None:
        for name, number in NUMBERS.items():
            setattr(registers, name, self._uc.reg_read(number))
