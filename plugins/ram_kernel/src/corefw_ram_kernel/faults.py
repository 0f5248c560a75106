"""Serves a guest's page faults: see faults.c."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from corefw_ram_kernel.arriving import ArrivingBlock, Block
from corefw_ram_kernel.journal import FaultJournal
from corefw_ram_kernel.library import LIBRARY, WRONG

FAULTS: Final = 32
"""Faults that are read at once."""

_MESSAGE: Final = 4 + 12 + 256
_u64 = ctypes.c_uint64


class _Region(ctypes.Structure):
    """`struct region` in faults.c."""

    _fields_ = (("block", ctypes.POINTER(Block)), ("size", _u64), ("request", ctypes.c_uint8 * _MESSAGE))


class _Missed(ctypes.Structure):
    _fields_ = (("region", _u64), ("page", _u64))


class _Serving(ctypes.Structure):
    """`struct serving` in faults.c."""

    _fields_ = (
        ("regions", ctypes.POINTER(_Region)),
        ("count", _u64),
        ("journal", _u64),
        ("userfaultfd", ctypes.c_int64),
        ("wake", ctypes.c_int64),
        ("until", _u64),
        ("sent", _u64),
        ("size", _u64),
        ("left", _u64),
        ("missed", _Missed * FAULTS),
        ("requests", ctypes.c_uint8 * (FAULTS * _MESSAGE)),
    )


_serve: Final = LIBRARY.corefw_serve_faults
_serve.argtypes = (ctypes.c_int, ctypes.POINTER(_Serving))


class ServedFaults(NamedTuple):
    """What is left to do.

    unsent   the rest of the requests, of which the socket did not take all
    missed   (number of the block in `blocks`, page): to be installed or requested
    error    what read(2) or send(2) reported; None: nothing
    """

    unsent: bytes
    missed: Sequence[tuple[int, int]]
    error: OSError | None


class FaultServer:
    """The faults of the guest of a userfaultfd, which does not block.

    blocks   all of its RAM: each with the message that requests its first page, with the offset at the bytes 4 to 11
    """

    def __init__(
        self, *, userfaultfd: int, journal: FaultJournal, blocks: Sequence[tuple[ArrivingBlock, bytes]]
    ) -> None:
        self._blocks = blocks
        self._journal = journal
        self._userfaultfd = userfaultfd
        self._regions = (_Region * len(blocks))()
        for region, (block, message) in zip(self._regions, blocks, strict=True):
            if len(message) > _MESSAGE:
                raise ValueError(f"cannot send a request of {len(message)} bytes")
            region.block, region.size = ctypes.pointer(block.structure), len(message)
            region.request[: len(message)] = message

    def serve(self, descriptor: int, wake: int, seconds: float | None) -> ServedFaults:
        """Serve faults, without the interpreter lock, until something is left to do, the descriptor `wake` is readable,
        or `seconds` are over. Also returns when the journal is half full, or has entries and there are no faults.

        descriptor   a connected stream socket over which pages are requested; negative: they are left to the caller
        """
        at = _Serving(
            self._regions,
            len(self._regions),
            self._journal.address,
            self._userfaultfd,
            wake,
            0 if seconds is None else time.monotonic_ns() + round(seconds * 1e9),
        )
        error = _serve(descriptor, at)
        if error == WRONG:
            raise ValueError(f"cannot serve the faults of {len(self._regions)} blocks")
        return ServedFaults(
            bytes(at.requests)[at.sent : at.size],
            [(one.region, one.page) for one in at.missed[: at.left]],
            OSError(error, os.strerror(error)) if error else None,
        )
