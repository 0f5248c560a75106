"""Compiled code for the section 'ram': how pages are received, and sent in postcopy.

    receive_lists    before the guest runs, straight into its RAM
    ArrivingBlock    while the guest runs (postcopy)
    FaultServer      requests the pages that it waits for then, and installs those that have arrived
    FaultJournal     what happens to its page faults
    DirtyBlock       the source of a postcopy sends what is left
    PageServer       and answers page requests

`corefw_ram` finds them, as attributes of Kernel, by the entry point `ram` in the group `corefw.kernel`, and does the
same in Python where this distribution is not installed.
"""

from __future__ import annotations

import ctypes
from typing import Final

from corefw_ram_kernel.arriving import ArrivingBlock
from corefw_ram_kernel.faults import FaultServer
from corefw_ram_kernel.journal import FaultJournal
from corefw_ram_kernel.library import LIBRARY, WRONG, check
from corefw_ram_kernel.requests import PageServer
from corefw_ram_kernel.sending import MOST, PIECE, DirtyBlock

LIST: Final = 512
"""Pages in a list at most, and headers that the header room holds."""


class _Request(ctypes.Structure):
    """`struct request` in lists.c."""

    _fields_ = (
        ("ram", ctypes.c_uint64),
        ("pages", ctypes.c_uint64),
        ("headers", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("most", ctypes.c_uint64),
        ("total", ctypes.c_uint64),
    )


class _Result(ctypes.Structure):
    """`struct result` in lists.c."""

    _fields_ = (("whole", ctypes.c_uint64), ("listed", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


_receive: Final = LIBRARY.corefw_receive_lists
_receive.argtypes = (ctypes.c_int, ctypes.POINTER(_Request), ctypes.POINTER(_Result))


def receive_lists(
    descriptor: int, *, ram: int, pages: int, headers: int, first: int, size: int, most: int, total: int
) -> tuple[int, int, int]:
    """Receive records of consecutive pages from a connected stream socket into the pages themselves, without the
    interpreter lock.

    ram       address of the block, which has `pages` pages of 4096 bytes
    headers   address of room for LIST headers of 8 bytes
    first     the page that is expected next
    size      pages in the first list; each list that came as expected doubles it, up to `most` (both 1 to LIST)
    total     pages to receive at most; they end within the block

    Returns (whole, listed, bytes): how many pages came in complete lists with the expected headers, how many the list
    after those has (0 if `total` pages came), and how many bytes of it came, in the order header, page. Its headers are
    in the header room; nothing is known of them and of its pages. No bytes of a list, where it is the first: the end of
    the stream.

    A list waits for all of its bytes, or until the socket's SO_RCVTIMEO is over. Raises BlockingIOError if no byte came
    by then, ValueError for numbers that do not fit, OSError as recvmsg(2) does.
    """
    result = _Result()
    request = (ram, pages, headers, first, size, most, total)
    fits = all(0 <= number < 1 << 64 for number in request)  # ctypes would cut them
    error = _receive(descriptor, _Request(*request), result) if fits else WRONG
    check(error, lambda: f"cannot receive {total} pages from {first} on into a block of {pages}: {size=}, {most=}")
    return result.whole, result.listed, result.bytes


class Kernel:
    """What the entry point names; not made, only asked for these."""

    receive_lists = staticmethod(receive_lists)
    ArrivingBlock = ArrivingBlock
    FaultServer = FaultServer
    FaultJournal = FaultJournal
    DirtyBlock = DirtyBlock
    PageServer = PageServer


__all__ = [
    "LIST",
    "MOST",
    "PIECE",
    "ArrivingBlock",
    "DirtyBlock",
    "FaultJournal",
    "FaultServer",
    "Kernel",
    "PageServer",
    "receive_lists",
]
