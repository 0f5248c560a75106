"""A machine around the unicorn CPU emulator: x86-64 machine code that moves between hosts while it runs.

program     the guest: a few instructions, and the proof that none of its writes was lost
registers   the CPU's registers as a VMState
machine     UnicornMachine, which the entry point names
"""

from migfw_unicorn.machine import UnicornMachine

__all__ = ["UnicornMachine"]
