"""Find the migration stream in a file: at an offset, or after the header of a libvirt save image.

libvirt's `virsh save` writes a header, the domain's XML and a cookie, and then the stream, possibly compressed. It is
decompressed if the standard library can do that.

Source of the header: libvirt 11.3, qemu_saveimage.h and qemu_saveimage.c.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Final

from corefw.channel import FileBacked
from corefw.errors import StreamError, UsageError
from corefw.quantities import parse_size
from corefw.wire.stream import MAX_FILE

OFFSET: Final = ",offset="

LIBVIRT_MAGIC: Final = b"LibvirtQemudSave"
LIBVIRT_PARTIAL: Final = b"LibvirtQemudPart"
LIBVIRT_VERSION: Final = 2
LIBVIRT_FORMATS: Final = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
"""Indexed by the number in the header; sparse is a mapped-ram stream."""

_HEADER: Final = Struct("<16s5I56x")
_HEADER_BIG: Final = Struct(">16s5I56x")

_OPENERS: Final[Mapping[str, Callable[[io.FileIO], io.BufferedIOBase]]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
_UNCOMPRESSED: Final = frozenset({"raw", "sparse"})


def split_offset(text: str) -> tuple[str, int]:
    """ "PATH,offset=N" -> path and offset, as QEMU 8.2 and later read a file: URI. Raises UsageError."""
    path, option, number = text.partition(OFFSET)
    if not option:
        return path, 0
    try:
        offset = int(number, 16) if number.lower().startswith("0x") else parse_size(number)
    except (UsageError, ValueError):
        raise UsageError(f"'{number}' is not an offset: expected bytes, as in offset=4096, 0x1000 or 64K") from None
    if offset > MAX_FILE:
        raise UsageError(f"'{number}' is not an offset: no file is longer than 4 EiB")
    return path, offset


@dataclass(frozen=True, slots=True)
class SaveImage:
    """The header of a libvirt save image.

    format        one of LIBVIRT_FORMATS
    was_running   whether libvirt starts the guest after a restore; it always stops the guest before it saves
    data_length   bytes of XML, cookie and padding between header and stream
    """

    format: str
    was_running: bool
    data_length: int


def parse_save_image(head: bytes) -> SaveImage | None:
    """The header at the start of a file; None if the file is not a save image. Raises StreamError for an image that
    cannot be restored."""
    if head.startswith(LIBVIRT_PARTIAL):
        raise StreamError("an incomplete libvirt save image: 'virsh save' failed or is still writing it")
    if not head.startswith(LIBVIRT_MAGIC):
        return None
    if len(head) < _HEADER.size:
        raise StreamError(f"a libvirt save image of {len(head)} bytes, cut in its header of {_HEADER.size}")
    fields = next(
        (found for found in (_HEADER.unpack(head), _HEADER_BIG.unpack(head)) if found[1] <= LIBVIRT_VERSION), None
    )
    if fields is None:
        raise StreamError(f"a libvirt save image of a version above {LIBVIRT_VERSION}, which migfw does not know")
    _, version, data_length, was_running, number, _ = fields
    if version < LIBVIRT_VERSION:
        number = 0  # version 1 does not compress
    if number >= len(LIBVIRT_FORMATS):
        raise StreamError(f"a libvirt save image of format {number}: expected at most {len(LIBVIRT_FORMATS) - 1}")
    return SaveImage(LIBVIRT_FORMATS[number], bool(was_running), data_length)


class StreamFile(FileBacked):
    """The stream in an open file, which stays the caller's. Reading raises OSError.

    image    the libvirt save image that it is in, or None
    """

    def __init__(self, fd: int, offset: int = 0) -> None:
        """`fd` is a file at its start, or a pipe. Raises OSError, and StreamError for a save image that cannot be
        read."""
        self._fd = fd
        self._seeks = stat.S_ISREG(mode := os.fstat(fd).st_mode) or stat.S_ISBLK(mode)
        self._decoder: io.BufferedIOBase | None = None
        self._head = b""
        self.origin = 0
        self._advance(offset)
        head = self._read_head()
        self.image = parse_save_image(head)
        if self.image is None:
            self._head = head
        else:
            self._advance(self.image.data_length)
            self._decoder = self._open_decoder(self.image.format)

    @property
    def is_compressed(self) -> bool:
        return self._decoder is not None

    def receive_into(self, view: memoryview, /) -> int:
        """Read some bytes into the start of `view`; 0 at the end."""
        if self._head:
            count = min(len(view), len(self._head))
            view[:count], self._head = self._head[:count], self._head[count:]
            return count
        if self._decoder is None:
            return os.readv(self._fd, [view])
        try:
            return self._decoder.readinto(view)
        except EOFError:
            return 0  # the reader reports what is missing
        except (OSError, zlib.error, lzma.LZMAError) as error:
            raise OSError(errno.EIO, f"the compressed stream is damaged ({error})") from None

    def skip(self, count: int) -> None:
        """See FileBacked. Reads and discards the bytes if the file cannot seek."""
        held = min(count, len(self._head))
        self._head = self._head[held:]
        count -= held
        if self._seeks and self._decoder is None:
            os.lseek(self._fd, count, os.SEEK_CUR)
            return
        scratch = memoryview(bytearray(min(count, 1 << 20)))
        while count and (done := self.receive_into(scratch[:count])):
            count -= done

    def _advance(self, count: int) -> None:
        self.skip(count)
        self.origin += count

    def _read_head(self) -> bytes:
        head = bytearray()
        while len(head) < _HEADER.size and (more := os.read(self._fd, _HEADER.size - len(head))):
            head += more
            if not (LIBVIRT_MAGIC.startswith(head[:16]) or LIBVIRT_PARTIAL.startswith(head[:16])):
                break
        if head.startswith(LIBVIRT_MAGIC):
            self.origin += len(head)
        return bytes(head)

    def _open_decoder(self, name: str) -> io.BufferedIOBase | None:
        if name in _UNCOMPRESSED:
            return None
        if name not in _OPENERS:
            raise StreamError(
                f"a libvirt save image that {name} compressed, which migfw cannot read: decompress it with"
                f" 'tail -c +{self.origin + 1} FILE | {name} -dc > STREAM'"
            )
        return _OPENERS[name](io.FileIO(self._fd, closefd=False))
