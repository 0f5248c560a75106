"""Sends what is left of a RAM block in postcopy: see sending.c.

Addresses are integers; the caller keeps the memory behind them alive, and mapped.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw_ram_kernel.library import LIBRARY, QUICK, check

MOST: Final = 2048
"""Pages that are claimed at most after one begin()."""
PIECE: Final = 16
"""Pages that are claimed and sent at once."""
NAME: Final = 255
"""Bytes of a block's name, at most."""

_u64 = ctypes.c_uint64


class SentBlock(ctypes.Structure):
    """`struct sent_block` in piece.h."""

    _fields_ = (("ram", _u64), ("pages", _u64), ("dirty", _u64), ("hole", _u64))


class Piece(ctypes.Structure):
    """`struct piece` in piece.h."""

    _fields_ = (
        ("count", _u64),
        ("sent", _u64),
        ("pages", _u64 * PIECE),
        ("sizes", _u64 * PIECE),
        ("zero", _u64 * PIECE),
        ("heads", ctypes.c_uint8 * (8 + 1 + NAME + 1) * PIECE),
    )


class _Sending(ctypes.Structure):
    """`struct sending` in sending.c."""

    _fields_ = (
        ("block", SentBlock),
        ("next", _u64),
        ("most", _u64),
        ("claimed", _u64),
        ("zeros", _u64),
        ("bytes", _u64),
        ("piece", Piece),
        ("list", _u64 * MOST),
    )


_send: Final = LIBRARY.corefw_send_dirty
_send.argtypes = (ctypes.c_int, ctypes.POINTER(_Sending))
_claim: Final = QUICK.corefw_claim_dirty
_claim.argtypes = (ctypes.POINTER(SentBlock), _u64, _u64, _u64)


class DirtyBlock:
    """A RAM block that is being sent: its pages of 4096 bytes, and a byte for each, which says whether it is dirty."""

    def __init__(self, *, ram: int, pages: int, dirty: int, hole: int) -> None:
        """Addresses of the block, of the marks, and of a byte a page which says that it was never touched."""
        numbers = (ram, pages, dirty, hole)
        if not all(0 < number < 1 << 64 for number in numbers):  # ctypes would cut them
            raise ValueError(f"cannot send a block of {pages} pages: {ram=}, {dirty=}, {hole=}")
        self.block: Final = SentBlock(*numbers)
        self._at = _Sending(self.block)

    def begin(self, first: int, most: int) -> None:
        """Send at most so many dirty pages (1 to MOST), from the page `first` on. Everything before has to be done."""
        at = self._at
        if at.piece.count or not (0 <= first <= at.block.pages and 1 <= most <= MOST):
            raise ValueError(f"cannot send {most} pages from {first} on of a block of {at.block.pages}")
        at.next, at.most, at.claimed, at.zeros = first, most, 0, 0

    def send(self, descriptor: int) -> int:
        """Claim and send pages over a connected stream socket, without the interpreter lock: the bytes that went.

        Raises BlockingIOError if none did before the socket's SO_SNDTIMEO was over, OSError as sendmsg(2) does.
        """
        check(_send(descriptor, self._at), lambda: "the block was changed while it was being sent")
        return int(self._at.bytes)

    @property
    def done(self) -> bool:
        """Whether all that was claimed has gone out."""
        return not self._at.piece.count

    @property
    def next(self) -> int:
        """Where to begin next time."""
        return int(self._at.next)

    @property
    def claimed(self) -> NDArray[np.int64]:
        """The pages that were claimed since begin(), a copy."""
        return np.ctypeslib.as_array(self._at.list)[: self._at.claimed].astype(np.int64)

    @property
    def zeros(self) -> int:
        """How many of these went out as zero pages."""
        return int(self._at.zeros)

    def claim(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these pages the caller is to send instead; from any thread, also during send()."""
        pages = np.ascontiguousarray(pages, dtype=np.int64)
        claimed = np.zeros(len(pages), dtype=np.bool_)
        if len(pages) and not 0 <= pages.min() <= pages.max() < self.block.pages:
            raise ValueError(f"no such pages in a block of {self.block.pages}: {pages}")
        error = _claim(self.block, pages.ctypes.data, len(pages), claimed.ctypes.data)
        check(error, lambda: "the block was changed while it was being sent")
        return claimed
