"""The guest: an endless loop that counts in memory, all over its RAM.

The upper half of RAM is an array of 64-bit counters; their number is a power of two. Write n adds one to the counter
n * STRIDE modulo that number. STRIDE is odd, so every counter is visited before one is visited again. The number of
writes, which the guest counts in a register, therefore determines the value of every counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MachineError
from migfw_unicorn.registers import Registers

BASE: Final = 0x100000
"""Where RAM begins in the guest's address space, and the code in RAM."""

STRIDE: Final = 4097
"""Distance between two writes, in counters. A page holds 512, so consecutive writes are on different pages."""

CODE: Final = bytes.fromhex(
    "48ff04d7"  # 0   loop: inc qword [rdi + rdx*8]
    "4c01c2"  # 4         add rdx, r8
    "4821ca"  # 7         and rdx, rcx
    "48ffc3"  # 10        inc rbx
    "ebf1"  # 13        jmp loop
)
_WRITTEN: Final = 4
_COUNTED: Final = 13


def first_registers(length: int) -> Registers:
    """The registers with which a guest of `length` bytes of RAM begins."""
    return Registers(rip=BASE, rdi=BASE + length // 2, rcx=_counters(length) - 1, r8=STRIDE)


def verify(ram: memoryview, registers: Registers) -> Mapping[str, object]:
    """Check every counter. Raises MachineError for writes that are missing, or too many."""
    counters: NDArray[np.uint64] = np.frombuffer(ram[len(ram) // 2 :], dtype=np.uint64)
    done = _writes(registers)
    expected = np.full(len(counters), done // len(counters), dtype=np.uint64)
    expected[np.arange(done % len(counters)) * STRIDE % len(counters)] += np.uint64(1)
    wrong = np.flatnonzero(counters != expected)
    if len(wrong):
        first = wrong[0]
        raise MachineError(
            f"{len(wrong)} of {len(counters)} counters are wrong after {done} writes: counter {first} is"
            f" {counters[first]}, expected {expected[first]}"
        )
    return {"writes": done, "counters": len(counters)}


def _writes(registers: Registers) -> int:
    """Number of writes. The emulator may have stopped the guest between a write and the instruction that counts it."""
    return registers.rbx + (_WRITTEN <= registers.rip - BASE < _COUNTED)


def _counters(length: int) -> int:
    return length // 2 // 8
