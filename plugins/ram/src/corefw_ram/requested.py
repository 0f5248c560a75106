"""The destination's half of postcopy-preempt: requested pages, which come over a channel of their own.

Each page comes in a record like those of the stream, and nothing frames them. The channel ends with EOS; QEMU from 8.0
on leaves that out, unless its machine type is older than 8.0.

Source: QEMU 7.2 and 10.0, postcopy_preempt_thread, ram_load_postcopy (migration/ram.c). Threads: one of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from corefw.errors import ANYTHING
from corefw.wire.constants import TARGET_PAGE_SIZE, RamFlag
from corefw.wire.records import RamHeader, read_block_name, read_ram_header
from corefw.wire.stream import StreamReader
from corefw_ram.kernel import KernelBlock, Requested
from corefw_ram.postcopy_load import ArrivingBlock


def load_requested(reader: StreamReader, find_block: Callable[[str], ArrivingBlock]) -> None:
    """Store and install pages up to EOS. `find_block` raises StreamError for a name that is no RAM block's.

    Raises RemoteStreamError for anything but records of single pages, ChannelError.
    """
    arriving: ArrivingBlock | None = None
    while True:
        if arriving is not None:
            _receive_in_place(reader, arriving)
        header = read_ram_header(reader)
        if header.kind is RamFlag.EOS:
            return
        if header.kind not in (RamFlag.PAGE, RamFlag.ZERO):
            raise reader.error("a page or a zero page", f"a RAM record with the flags {int(header.flags):#x}")
        if header.named:
            arriving = find_block(read_block_name(reader))
        if arriving is None:
            raise reader.error("a record that names its RAM block", "one that goes on with the block before")
        _load_page(reader, arriving, header)


def _load_page(reader: StreamReader, arriving: ArrivingBlock, header: RamHeader) -> None:
    block = arriving.block
    if header.address >= block.length:
        raise reader.error(f"an offset below {block.length:#x} in RAM block '{block.idstr}'", f"{header.address:#x}")
    page = header.address // TARGET_PAGE_SIZE
    if header.kind is RamFlag.ZERO:
        arriving.fill(np.array([page]), reader.u8("a page's fill byte"))
    else:
        arriving.store_page(page, reader.read(TARGET_PAGE_SIZE, "a page"))


def _receive_in_place(reader: StreamReader, arriving: ArrivingBlock) -> None:
    """Receive whole pages of this block with compiled code, where there is such, until something else comes."""
    kernel = arriving.kernel
    start, end = reader.span()
    if kernel is None or not reader.receives_from_socket or start < end:
        return
    while not (requested := _receive_some(reader, arriving, kernel)).left:
        if not requested.taken:
            return


def _receive_some(reader: StreamReader, arriving: ArrivingBlock, kernel: KernelBlock) -> Requested:
    requested: Requested | None = None

    def receive(descriptor: int) -> int:
        nonlocal requested
        requested = kernel.receive_requested(descriptor)
        arriving.install_failed(requested.failed)
        return requested.taken

    try:
        reader.receive_from_socket(receive)
    except ANYTHING:  # also after `receive` has returned, if the channel was aborted
        arriving.give_up(None if requested is None else requested.begun)
        raise
    assert requested is not None
    reader.unread(requested.left)
    if requested.begun is not None:
        arriving.finish(reader, requested.begun)
    return requested
