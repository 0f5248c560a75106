"""Receives pages straight into the RAM of a guest that runs already, with compiled code.

What is in the reader's buffer is stored from there; then the socket's bytes go where the next missing pages are
(arriving.c in plugins/ram_kernel). Anything but records of whole pages, or a page that was not expected, is put back
into the reader, to be parsed the usual way.

Where a section's body is expected to end, which is after as many pages as the one before, only a few bytes are received
at once.

Threads: the incoming thread.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import ANYTHING
from corefw.wire.stream import StreamReader
from corefw_ram.direct import InPlaceReceiver
from corefw_ram.kernel import Begun, KernelBlock, Stored
from corefw_ram.lists import FLAGS
from corefw_ram.records import HEADER, PAGE_RECORD

if TYPE_CHECKING:
    from corefw_ram.postcopy_load import ArrivingBlock

KIND: Final = FLAGS.to_bytes(2, "big")
"""The last 12 bits of the header of a record of a whole page; those before them are of the page's number."""

UNLIMITED: Final = 1 << 62


class ArrivingReceiver(InPlaceReceiver):
    """Receives pages of one block."""

    def __init__(self, arriving: ArrivingBlock, kernel: KernelBlock) -> None:
        self._arriving = arriving
        self._kernel = kernel
        self._pages = len(arriving.marks)
        self._next = self._pages  # the page expected next
        self._in_body = 0  # pages since the body of the section began
        self._last_body = 0  # and in the one before

    @property
    def expects(self) -> bool:
        return self._next < self._pages

    def end_body(self) -> None:
        self._last_body, self._in_body = self._in_body, 0

    def note_stored(self, pages: NDArray[np.int64]) -> None:
        self._next = int(pages[-1]) + 1
        self._in_body += len(pages)

    def receive(self, reader: StreamReader) -> bool:
        begun, progress = None, False
        start, end = reader.span()
        if end - start >= HEADER and _is_page(reader):
            stored = self._store_held(reader)
            begun, progress = stored.begun, stored.taken > 0
            if not progress and end - start < PAGE_RECORD and not reader.receives_from_socket:
                return reader.fill()  # the rest of a record will come, and more with it
        start, end = reader.span()
        if start < end or not reader.receives_from_socket or not (begun or self.expects):
            return progress
        return self._receive(reader, begun) or progress

    def _store_held(self, reader: StreamReader) -> Stored:
        """Store the records at the start of the reader's buffer."""
        start, end = reader.span()
        buffer = ctypes.c_char.from_buffer(reader.buffer, start)
        stored = self._kernel.store(ctypes.addressof(buffer), end - start, begin=reader.receives_from_socket)
        reader.skip(stored.taken)
        self._in_body += -(-stored.taken // PAGE_RECORD)
        if stored.taken:
            self._next = stored.next
        try:
            self._arriving.install_failed(stored.failed)
        except ANYTHING:
            self._arriving.give_up(stored.begun)
            raise
        return stored

    def _receive(self, reader: StreamReader, begun: Begun | None) -> bool:
        """Receive from the socket; False at the end of the stream."""
        left = self._last_body - self._in_body
        total = left if left > 0 or self._in_body == self._last_body else UNLIMITED
        stored: Stored | None = None

        def receive(descriptor: int) -> int:
            nonlocal stored
            stored = self._kernel.receive(descriptor, self._next, total, begun)
            self._arriving.install_failed(stored.failed)
            return stored.taken

        try:
            reader.receive_from_socket(receive)
        except ANYTHING:  # also after `receive` has returned, if the channel was aborted
            self._arriving.give_up(begun, None if stored is None else stored.begun)
            raise
        if stored is None:  # the stream had ended before
            self._arriving.give_up(begun)
            return False
        reader.unread(stored.left)
        self._next = stored.next
        self._in_body += stored.whole
        if stored.begun is not None:
            self._arriving.finish(reader, stored.begun)
        return stored.taken > 0


def _is_page(reader: StreamReader) -> bool:
    at = reader.span()[0] + HEADER - len(KIND)
    return reader.buffer[at] & 0xF == KIND[0] and reader.buffer[at + 1] == KIND[1]
