"""Receives lists of page records into place: headers into a buffer, pages into guest RAM.

Two loops do the same: one in NumPy, one in C (kernel.py), which is used where it is installed and the channel is a
socket.

Threads: the incoming thread.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corefw.machine import RamBlock
from corefw.wire.constants import TARGET_PAGE_SIZE, RamFlag
from corefw.wire.stream import StreamReader
from corefw_ram.kernel import find_kernel
from corefw_ram.records import HEADER, PAGE_RECORD

MOST: Final = 512
"""Pages in a list at most: with their headers the 1024 pieces that a system call takes."""
LISTS: Final = 16
"""Lists that compiled code receives at most before it returns, so that a cancel is noticed."""

FLAGS: Final = int(RamFlag.PAGE | RamFlag.CONTINUE)

OFFSETS: Final = np.arange(MOST, dtype=np.uint64) * np.uint64(TARGET_PAGE_SIZE)
HEADERS: Final = OFFSETS | np.uint64(FLAGS)
"""The headers of a run from page 0 on."""


class Received(NamedTuple):
    """What came of a run.

    whole   pages of the lists that came completely and with the headers expected
    listed  pages in the list after those, of which nothing is known yet; 0 if there was none
    size    bytes of it that came, in the order header, page; 0 with no whole list: the end of the stream
    """

    whole: int
    listed: int
    size: int


class ListReceiver:
    """Receives one block's pages in lists."""

    def __init__(self, block: RamBlock) -> None:
        self._kernel = find_kernel()
        self._base = block.pages.ctypes.data
        self.headers: Final = np.empty(MOST, dtype=">u8")
        self._pieces = np.empty((2 * MOST, 2), dtype=np.uint64)
        self._pieces[0::2, 0] = self.headers.ctypes.data + HEADER * np.arange(MOST)
        self._pieces[0::2, 1] = HEADER
        self._pieces[1::2, 1] = TARGET_PAGE_SIZE
        self._places = self._pieces[1::2, 0]

    def receive(
        self, reader: StreamReader, ram: NDArray[np.uint8], first: int, size: int, most: int, total: int
    ) -> Received:
        """Receive pages from `first` on, `total` at most, which end within the block. The first list has `size` pages,
        and each that came as expected doubles the next one, up to `most`. The reader's buffer is empty; `ram` is all of
        the block's pages, which the caller keeps mapped.

        The headers of the last list are in `headers`.
        """
        if self._kernel is None or not reader.receives_from_socket:
            count = min(size, most, total)
            np.add(OFFSETS[:count], np.uint64(self._base + first * TARGET_PAGE_SIZE), out=self._places[:count])
            return Received(0, count, reader.receive_memory(self._pieces[: 2 * count]))
        kernel, received = self._kernel, Received(0, 0, 0)

        def receive(descriptor: int) -> int:
            nonlocal received
            received = Received(
                *kernel.receive_lists(
                    descriptor,
                    ram=self._base,
                    pages=len(ram),
                    headers=self.headers.ctypes.data,
                    first=first,
                    size=size,
                    most=most,
                    total=min(total, LISTS * MOST),
                )
            )
            return received.whole * PAGE_RECORD + received.size

        reader.receive_from_socket(receive)
        return received

    def count_right(self, first: int, count: int) -> int:
        """How many of the first `count` headers are those of the pages from `first` on, up to the first that is not."""
        right = self.headers[:count] == HEADERS[:count] + np.uint64(first * TARGET_PAGE_SIZE)
        return count if right.all() else int(right.argmin())

    def header(self, number: int) -> memoryview:
        return self.headers[number : number + 1].data.cast("B")
