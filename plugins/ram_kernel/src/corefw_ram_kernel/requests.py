"""Answers page requests in postcopy: see requests.c.

Addresses are integers; the caller keeps the memory behind them alive, and mapped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Final, NamedTuple

from corefw_ram_kernel.library import LIBRARY, check
from corefw_ram_kernel.sending import NAME, DirtyBlock, Piece, SentBlock

ROOM: Final = 4096
"""Bytes of the return path that are received at once, and so are left to the caller at most."""

_u64 = ctypes.c_uint64


class _AskedBlock(ctypes.Structure):
    """`struct asked_block` in requests.c."""

    _fields_ = (
        ("block", SentBlock),
        ("claimed", _u64),
        ("name_size", _u64),
        ("name", ctypes.c_uint8 * NAME),
    )


class _Requests(ctypes.Structure):
    """`struct requests` in requests.c."""

    _fields_ = (
        ("blocks", ctypes.POINTER(_AskedBlock)),
        ("count", _u64),
        ("asked", _u64),
        ("named", _u64),
        ("claiming", _u64),
        ("requests", _u64),
        ("zeros", _u64),
        ("taken", _u64),
        ("sent", _u64),
        ("error", ctypes.c_int64),
        ("next", _u64),
        ("end", _u64),
        ("piece", Piece),
        ("first", _u64),
        ("held", _u64),
        ("bytes", ctypes.c_uint8 * ROOM),
    )


_serve: Final = LIBRARY.corefw_serve_requests
_serve.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Requests))
_finish: Final = LIBRARY.corefw_finish_request
_finish.argtypes = (ctypes.c_int, ctypes.POINTER(_Requests))


class Served(NamedTuple):
    """What was done about requests.

    requests   that were answered or begun
    claimed    for each block that has any, how many pages were claimed to be sent
    zeros      how many of all these went out as zero pages
    """

    requests: int
    claimed: dict[str, int]
    zeros: int


class PageServer:
    """Answers requests for pages of these blocks, in a single thread."""

    def __init__(self, blocks: Mapping[str, DirtyBlock]) -> None:
        """`blocks` by name. Another thread may send what is left of them. Raises ValueError for a name that is too
        long for the stream."""
        names = [name.encode() for name in blocks]
        if any(len(name) > NAME for name in names):
            raise ValueError(f"cannot answer requests: a block's name is longer than {NAME} bytes")
        self._names = list(blocks)
        self._blocks = (_AskedBlock * len(blocks))()
        for asked, name, block in zip(self._blocks, names, blocks.values(), strict=True):
            asked.block = block.block
            asked.name_size = len(name)
            ctypes.memmove(asked.name, name, len(name))
        self._at = _Requests(self._blocks, len(blocks), len(blocks), len(blocks))

    def serve(self, incoming: int, outgoing: int) -> int:
        """Wait for messages of the return path for a moment, and answer those that ask for pages, without the
        interpreter lock, until another one comes: the bytes received, 0 at the end of the stream.

        Both are connected stream sockets. Nothing may have been left unfinished. Raises BlockingIOError if nothing
        came, OSError as recvmsg(2) does.
        """
        check(_serve(incoming, outgoing, self._at), lambda: "the blocks were changed while requests were answered")
        return int(self._at.taken)

    def finish(self, outgoing: int) -> None:
        """Send the rest of a request that the socket did not take. Raises BlockingIOError if it has not taken all of it
        yet, OSError as sendmsg(2) does."""
        check(_finish(outgoing, self._at), lambda: "the blocks were changed while a request was answered")

    @property
    def unfinished(self) -> bool:
        """Whether finish() has something to do, if only to raise what is wrong."""
        return bool(self._at.error)

    @property
    def left(self) -> bytes:
        """Bytes that the last serve() has received and left to the caller."""
        return bytes(memoryview(self._at.bytes)[self._at.first : self._at.first + self._at.held])

    @property
    def sent(self) -> int:
        """Bytes that were sent since the last serve() began."""
        return int(self._at.sent)

    # -- the blocks that are gone on with --------------------------------------------------------------------------

    @property
    def asked(self) -> str | None:
        """The block of the last request, which one without a name is for; None if it is not among the blocks."""
        return self._name(self._at.asked)

    @asked.setter
    def asked(self, name: str | None) -> None:
        self._at.asked = self._number(name)

    @property
    def named(self) -> str | None:
        """The same for the last record that was sent."""
        return self._name(self._at.named)

    @named.setter
    def named(self, name: str | None) -> None:
        self._at.named = self._number(name)

    def _name(self, number: int) -> str | None:
        return self._names[number] if number < len(self._names) else None

    def _number(self, name: str | None) -> int:
        return self._names.index(name) if name in self._names else len(self._names)

    # -- what was done ---------------------------------------------------------------------------------------------

    @property
    def claiming(self) -> bool:
        """Whether pages may have been claimed since take(); from any thread."""
        return bool(self._at.claiming)

    def take(self) -> Served:
        """What was done since the last time."""
        claimed = {
            name: int(asked.claimed) for name, asked in zip(self._names, self._blocks, strict=True) if asked.claimed
        }
        served = Served(int(self._at.requests), claimed, int(self._at.zeros))
        for asked in self._blocks:
            asked.claimed = 0
        self._at.requests = self._at.zeros = self._at.claiming = 0
        return served
