"""Loads the pages of a block from a mapped-ram file, where each has its own place."""

from __future__ import annotations

import numpy as np

from corefw.machine import RamBlock
from corefw.memory.runs import runs_of_mask
from corefw.wire.records import read_bitmap, read_mapped_header
from corefw.wire.stream import StreamReader


def load_mapped_pages(reader: StreamReader, block: RamBlock) -> None:
    """Read what stands behind the block's entry in the list: header, bitmap and pages. Pages that are not in the file
    become zero."""
    header = read_mapped_header(reader, block.page_size, block.length)
    count = block.length // block.page_size
    bitmap = b"".join(read_bitmap(reader, header, block.length))
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    if bits[count:].any():
        raise reader.error(f"a bitmap of the {count} pages of '{block.idstr}'", "more pages")
    block.fill(np.flatnonzero(bits[:count] == 0), 0)
    for first, end in runs_of_mask(bits[:count] == 1).tolist():
        start, stop = first * block.page_size, end * block.page_size
        reader.pass_to(header.pages_offset + start, f"a page of '{block.idstr}'")
        reader.read_into(block.view[start:stop], f"pages of '{block.idstr}'")
    reader.pass_to(header.pages_offset + block.length, f"what follows the pages of '{block.idstr}'")
