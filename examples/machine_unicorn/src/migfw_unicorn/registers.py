"""The registers of an x86-64 CPU as a VMState.

Only what integer code uses: a guest with floating point or SSE would need those registers too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from unicorn import x86_const

from corefw.wire.vmstate import Kind, Scalar, VMState

_RESERVED_FLAG: Final = 2
"""Bit 1 of RFLAGS is always set."""


@dataclass
class Registers:
    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = _RESERVED_FLAG


NUMBERS: Final = {one.name: getattr(x86_const, f"UC_X86_REG_{one.name.upper()}") for one in fields(Registers)}
"""Name -> unicorn's number of the register."""

CPU: Final = VMState("cpu", version_id=1, fields=tuple(Scalar(name, Kind.U64) for name in NUMBERS))
