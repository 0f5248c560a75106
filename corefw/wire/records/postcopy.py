"""The payloads of postcopy's commands: ADVISE, RAM_DISCARD, RECV_BITMAP, and the bitmap that answers the last.

Source: QEMU 7.2 and 10.0, qemu_savevm_send_postcopy_* and loadvm_postcopy_ram_handle_discard (migration/savevm.c),
ramblock_recv_bitmap_send and ram_dirty_bitmap_reload (migration/ram.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corefw.errors import StreamError
from corefw.wire.constants import BE64, MAX_DISCARDS
from corefw.wire.stream import StreamReader, StreamWriter

_RANGE: Final = Struct(">QQ")
_DISCARD_VERSION: Final = 0
_END_MARK: Final = 0x0123456789ABCDEF


@dataclass(frozen=True, slots=True)
class PostcopyAdvice:
    """Bytes: the bitwise OR of the host page sizes of all blocks, and the target's page size."""

    page_sizes: int
    target_page_size: int


def parse_postcopy_advise(payload: bytes) -> PostcopyAdvice | None:
    """None for an empty payload: postcopy is only for dirty bitmaps then."""
    return PostcopyAdvice(int(BE64.unpack(payload[:8])[0]), int(BE64.unpack(payload[8:])[0])) if payload else None


def postcopy_advise_payload(advice: PostcopyAdvice | None) -> bytes:
    return b"" if advice is None else BE64.pack(advice.page_sizes) + BE64.pack(advice.target_page_size)


@dataclass(frozen=True, slots=True)
class Discard:
    """Pages of one RAM block that the destination must forget: the guest has written them since they were sent.

    `ranges` are (start, length) in bytes, at most MAX_DISCARDS of them.
    """

    block: str
    ranges: tuple[tuple[int, int], ...]


def parse_discard(payload: bytes) -> Discard:
    """The payload of POSTCOPY_RAM_DISCARD. Raises StreamError."""
    if len(payload) < 3 or len(payload) < payload[1] + 3:
        raise StreamError(f"RAM_DISCARD: expected a version, a block's name and a zero, got {len(payload)} bytes")
    end = 2 + payload[1]
    if payload[0] != _DISCARD_VERSION or payload[end] != 0:
        raise StreamError(f"RAM_DISCARD: expected version {_DISCARD_VERSION}, got {payload[0]}")
    pairs = payload[end + 1 :]
    if len(pairs) % _RANGE.size:
        raise StreamError(f"RAM_DISCARD: expected ranges of {_RANGE.size} bytes, got {len(pairs)} bytes of them")
    try:
        block = payload[2:end].decode()
    except UnicodeDecodeError:
        raise StreamError(f"RAM_DISCARD: expected a block's name as text, got {payload[2:end]!r}") from None
    return Discard(block, tuple(_RANGE.iter_unpack(pairs)))


def discard_payload(discard: Discard) -> bytes:
    name = discard.block.encode()
    assert len(discard.ranges) <= MAX_DISCARDS, f"{len(discard.ranges)} ranges in one RAM_DISCARD"
    head = bytes((_DISCARD_VERSION, len(name))) + name + b"\0"
    return head + b"".join(_RANGE.pack(start, length) for start, length in discard.ranges)


def discards(block: str, page_size: int, runs: NDArray[np.int64]) -> Iterator[Discard]:
    """Runs of pages (first, end) as the fewest RAM_DISCARDs."""
    for at in range(0, len(runs), MAX_DISCARDS):
        some = runs[at : at + MAX_DISCARDS].tolist()
        yield Discard(block, tuple((first * page_size, (end - first) * page_size) for first, end in some))


# -- the bitmap of what has arrived ------------------------------------------------------------------------------------


def _bitmap_size(pages: int) -> int:
    """Bytes of a bitmap on the wire: whole words of 64 bits."""
    return -(-pages // 64) * 8


def read_received_bitmap(reader: StreamReader, pages: int) -> NDArray[np.bool_]:
    """Read the bitmap after the return-path message RECV_BITMAP: for each of the block's pages, whether it has arrived.

    Raises RemoteStreamError for a bitmap of another size.
    """
    size, expected = reader.be64("the size of a received bitmap"), _bitmap_size(pages)
    if size != expected:
        raise reader.error(f"a received bitmap of {expected} bytes", f"one of {size}")
    data = np.frombuffer(reader.read(size, "a received bitmap"), dtype=np.uint8)
    mark = reader.be64("the end of a received bitmap")
    if mark != _END_MARK:
        raise reader.error(f"the end mark {_END_MARK:#x} of a received bitmap", f"{mark:#x}")
    return np.unpackbits(data, count=pages, bitorder="little").view(np.bool_)


def write_received_bitmap(writer: StreamWriter, received: NDArray[np.bool_]) -> None:
    size = _bitmap_size(len(received))
    writer.be64(size)
    writer.write(np.packbits(received, bitorder="little").tobytes().ljust(size, b"\0"))
    writer.be64(_END_MARK)
