"""Handles forks of a guest: a forked child does not get the arrays.

The arrays are not inherited (MADV_DONTFORK), because the dirty log would not see the writes of a child. In a child,
using an array's attribute raises RuntimeError with what to do instead. Views that the child holds get a private copy of
the memory, so nothing crashes and no write reaches the guest. subprocess and os.system() run no fork hooks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from corefw_machine_python.declarations import FORKED, Array
from corefw_machine_python.guest import Program

_MAP_NORESERVE: Final = 0x4000
_MAP_FIXED: Final = 0x10

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


@dataclass(frozen=True, slots=True)
class Mapped:
    """Memory of one array: an open memfd and the address of its mapping."""

    fd: int
    address: int


def watch_forks(
    program: Program, arrays: Sequence[Array], mapped: Sequence[Mapped], in_child: Callable[[], None]
) -> None:
    """Install fork hooks: warn at the first fork; in each child call `in_child` and remove the arrays."""
    warned: list[int] = []

    def in_parent() -> None:
        if not warned:
            warned.append(1)
            os.write(2, _warning(program).encode())

    def after_fork() -> None:
        in_child()
        for array, memory in zip(arrays, mapped, strict=True):
            program.__dict__[array.attribute] = FORKED
            _map_private(memory)

    os.register_at_fork(after_in_child=after_fork, after_in_parent=in_parent)


def _warning(program: Program) -> str:
    return (
        f"migfw: program '{type(program).__name__}' forks: its arrays are not in the new process, and nothing that it"
        " writes moves with the program (use threads, or multiprocessing.get_context('spawn') and give the processes"
        " copies)\n"
    )


def _map_private(memory: Mapped) -> None:
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
    size = os.fstat(memory.fd).st_size
    _libc.mmap(memory.address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, memory.fd, 0)
