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
"""Instructions in a slice: about 20 ms."""


class Emulator:
    """An x86-64 CPU with `length` bytes of RAM at `base`, which are at `address` in this process."""

    def __init__(self, base: int, length: int, address: int) -> None:
        self._end = base + length
        self._uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self._uc.mem_map_ptr(base, length, UC_PROT_ALL, address)

    def run_slice(self) -> None:
        """Run one slice from where the CPU stopped, without holding the GIL. Raises MachineError if it cannot go on."""
        try:
            self._uc.emu_start(self._uc.reg_read(UC_X86_REG_RIP), self._end, count=SLICE)
        except UcError as error:  # a jump or an access to where there is no RAM
            raise MachineError(f"the CPU has stopped: {error}") from None

    def load(self, registers: Registers) -> None:
        """Set the registers. Discards code compiled from earlier contents of RAM."""
        for name, number in NUMBERS.items():
            self._uc.reg_write(number, getattr(registers, name))
        self._uc.ctl_flush_tb()

    def save(self, registers: Registers) -> None:
        for name, number in NUMBERS.items():
            setattr(registers, name, self._uc.reg_read(number))
