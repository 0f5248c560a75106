"""Loads the pages of a block from a mapped-ram file, where each has its own place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.machine import RamBlock
from corefw.memory.runs import runs_of_mask
from corefw.wire.records import read_bitmap, read_mapped_header
from corefw.wire.stream import StreamReader

WINDOW: Final = 1 << 12
"""Bytes of the bitmap that are looked at at once: 128 MiB of RAM."""


def load_mapped_pages(reader: StreamReader, block: RamBlock) -> Iterator[NDArray[np.int64]]:
    """Read what stands behind the block's entry in the list: header, bitmap and pages. Pages that are not in the file
    become zero. Yields the numbers of those that were stored, some at a time."""
    header = read_mapped_header(reader, block.page_size, block.length)
    count = block.length // block.page_size
    bitmap = np.frombuffer(b"".join(read_bitmap(reader, header, block.length)), np.uint8)
    for at in range(0, len(bitmap), WINDOW):
        present = np.unpackbits(bitmap[at : at + WINDOW], bitorder="little") == 1
        first = 8 * at
        if present[count - first :].any():
            raise reader.error(f"a bitmap of the {count} pages of '{block.idstr}'", "more pages")
        block.fill(np.flatnonzero(~present[: count - first]) + first, 0)
        for begin, end in runs_of_mask(present, first).tolist():
            start = begin * block.page_size
            reader.pass_to(header.pages_offset + start, f"a page of '{block.idstr}'")
            reader.read_into(block.view[start : end * block.page_size], f"pages of '{block.idstr}'")
        if present.any():
            yield np.flatnonzero(present) + first
    reader.pass_to(header.pages_offset + block.length, f"what follows the pages of '{block.idstr}'")
