"""Pages that arrive while the guest runs: see block.c, arriving.c and requested.c.

Addresses are integers; the caller keeps the memory behind them alive, and mapped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corefw_ram_kernel.journal import FaultJournal
from corefw_ram_kernel.library import LIBRARY, QUICK, check

SOME: Final = 32
"""Pages in a list at most. The room for what was not expected holds as many records."""

_PAGE_SIZE: Final = 4096
_HEADER: Final = 8
_u64 = ctypes.c_uint64


class Block(ctypes.Structure):
    """`struct block` in block.h."""

    _fields_ = (
        ("ram", _u64),
        ("pages", _u64),
        ("marks", _u64),
        ("awaited", _u64),
        ("address", _u64),
        ("userfaultfd", ctypes.c_int64),
        ("journal", _u64),
        ("number", _u64),
    )


class _Failure(ctypes.Structure):
    """`struct failure` in block.h."""

    _fields_ = (
        ("first", _u64),
        ("end", _u64),
        ("error", ctypes.c_int64),
    )


class _Arrival(ctypes.Structure):
    """`struct arrival` in arriving.c."""

    _fields_ = (
        ("next", _u64),
        ("total", _u64),
        ("rest", _u64),
        ("page", _u64),
        ("part", _u64),
        ("taken", _u64),
        ("whole", _u64),
        ("left", _u64),
        ("failure", _Failure),
    )


class _Requested(ctypes.Structure):
    """`struct requested` in requested.c."""

    _fields_ = (
        ("taken", _u64),
        ("page", _u64),
        ("part", _u64),
        ("left", _u64),
        ("header", ctypes.c_uint8 * _HEADER),
        ("failure", _Failure),
    )


for _function, _arguments in (
    (LIBRARY.corefw_store_records, (ctypes.POINTER(Block), _u64, _u64, ctypes.c_int, ctypes.POINTER(_Arrival))),
    (LIBRARY.corefw_receive_records, (ctypes.c_int, ctypes.POINTER(Block), ctypes.POINTER(_Arrival))),
    (LIBRARY.corefw_receive_requested, (ctypes.c_int, ctypes.POINTER(Block), ctypes.POINTER(_Requested))),
    (QUICK.corefw_claim, (ctypes.POINTER(Block), _u64, _u64, _u64)),
    (QUICK.corefw_give_up, (ctypes.POINTER(Block), _u64, _u64)),
    (QUICK.corefw_mark_received, (ctypes.POINTER(Block), _u64, _u64, _u64)),
    (QUICK.corefw_await, (ctypes.POINTER(Block), _u64, _u64, _u64)),
):
    _function.argtypes = _arguments


class Begun(NamedTuple):
    """A page that the caller has to finish: it is claimed, and `size` bytes of it are in place."""

    page: int
    size: int


class Stored(NamedTuple):
    """What became of records.

    taken     bytes of the buffer that were consumed, or bytes that were received from the socket
    next      the page that is expected next
    whole     pages received in place, with the one that has begun
    begun     a page to be finished, if there is one
    left      the bytes, of those that were received, that came last and were not expected
    failed    (first, end) of a range in which pages that have arrived could not be installed; None if there are none
    """

    taken: int
    next: int
    whole: int
    begun: Begun | None
    left: memoryview
    failed: tuple[int, int] | None


class Requested(NamedTuple):
    """What came over the channel of requested pages.

    taken     bytes that were received; 0 at the end
    begun     a page to be finished, if there is one
    left      bytes of a header that came last, and that the caller has to deal with
    failed    as in Stored
    """

    taken: int
    begun: Begun | None
    left: bytes
    failed: tuple[int, int] | None


class ArrivingBlock:
    """A RAM block of `pages` pages of 4096 bytes that arrive while the guest runs.

    ram           its address in this process
    marks         address of a byte for each page: 0 missing, 1 claimed, 2 received
    awaited       address of a byte for each page: 1 if the guest has begun to wait for it
    userfaultfd   of the guest's process, where the block is at `address`; -1 if no guest waits for pages
    journal       where page faults are noted; `number` is the block's number there

    Threads: any. One at a time may call store() and receive().
    """

    def __init__(
        self,
        *,
        ram: int,
        pages: int,
        marks: int,
        awaited: int,
        userfaultfd: int,
        address: int,
        journal: FaultJournal,
        number: int,
    ) -> None:
        self._journal = journal  # as long as the block refers to it
        self._block = Block(ram, pages, marks, awaited, address, userfaultfd, journal.address, number)
        self._rest = memoryview(bytearray(SOME * (_HEADER + _PAGE_SIZE)))
        self._rest_address = ctypes.addressof(ctypes.c_char.from_buffer(self._rest))

    @property
    def structure(self) -> Block:
        """For other compiled code."""
        return self._block

    # -- the stream ------------------------------------------------------------------------------------------------

    def store(self, records: int, size: int, *, begin: bool) -> Stored:
        """Store the records of whole pages in the buffer at the address `records`, up to the first of another kind.
        `begin`: also begin the page of a record that is cut."""
        at = _Arrival()
        error = LIBRARY.corefw_store_records(self._block, records, size, begin, at)
        check(error, lambda: f"cannot store {size} bytes into a block of {self._block.pages} pages")
        return self._stored(at)

    def receive(self, descriptor: int, following: int, total: int, begun: Begun | None) -> Stored:
        """Receive records from a connected stream socket into the pages themselves, without the interpreter lock:
        first the rest of a page that has begun, then pages that are missing from `following` on, `total` at most.

        Returns when something else came, when nothing came for a while, or when there is something to tell. Nothing
        taken: the end of the stream. Raises BlockingIOError if no byte came for a while, OSError as recvmsg(2) does; no
        page is claimed then, but the one that had begun before.
        """
        page, part = (begun.page, begun.size + _HEADER) if begun else (0, 0)
        at = _Arrival(following, total, self._rest_address, page, part)
        error = LIBRARY.corefw_receive_records(descriptor, self._block, at)
        check(error, lambda: f"cannot receive from page {following} on into a block of {self._block.pages}: {begun=}")
        return self._stored(at)

    def _stored(self, at: _Arrival) -> Stored:
        return Stored(at.taken, at.next, at.whole, _begun(at.page, at.part), self._rest[: at.left], _failed(at.failure))

    # -- requested pages -------------------------------------------------------------------------------------------

    def receive_requested(self, descriptor: int) -> Requested:
        """Receive requested pages from a socket of their own, without the interpreter lock. Returns and raises as
        receive()."""
        at = _Requested()
        error = LIBRARY.corefw_receive_requested(descriptor, self._block, at)
        check(error, lambda: f"cannot receive into a block of {self._block.pages} pages")
        return Requested(at.taken, _begun(at.page, at.part), bytes(at.header)[: at.left], _failed(at.failure))

    # -- the marks, for a caller that stores pages itself ----------------------------------------------------------

    def claim(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Claim pages; which of them the caller is to store, and then to mark or give up."""
        return self._each(QUICK.corefw_claim, pages)

    def give_up(self, pages: NDArray[np.int64]) -> None:
        pages = np.ascontiguousarray(pages)
        check(QUICK.corefw_give_up(self._block, pages.ctypes.data, len(pages)), lambda: f"no such pages: {pages}")

    def mark_received(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The caller has stored these pages; which of them the guest waits for."""
        return self._each(QUICK.corefw_mark_received, pages)

    def wait_for(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The guest waits for these pages; which of them have not arrived."""
        return self._each(QUICK.corefw_await, pages)

    def _each(self, function: Callable[..., int], pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        pages = np.ascontiguousarray(pages)
        result = np.zeros(len(pages), dtype=np.bool_)
        error = function(self._block, pages.ctypes.data, len(pages), result.ctypes.data)
        check(error, lambda: f"no such pages in a block of {self._block.pages}: {pages}")
        return result


def _begun(page: int, part: int) -> Begun | None:
    return Begun(page, part - _HEADER) if part else None


def _failed(failure: _Failure) -> tuple[int, int] | None:
    return (failure.first, failure.end) if failure.error else None
