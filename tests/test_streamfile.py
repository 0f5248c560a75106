"""The place of the stream in a file: offsets, and libvirt save images as virsh writes them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path
from struct import pack

import pytest

from corefw.errors import StreamError, UsageError
from corefw.net.streamfile import SaveImage, StreamFile, parse_save_image, split_offset

STREAM = bytes(range(256)) * 40
XML = b"<domain/>\0"


def image(
    stream: bytes = STREAM,
    *,
    magic: bytes = b"LibvirtQemudSave",
    version: int = 2,
    running: int = 1,
    number: int = 0,
    order: str = "<",
) -> bytes:
    """A save image: the header, 64 KiB of room for a longer XML, and the stream."""
    data = XML + bytes(1 << 16)
    return magic + pack(order + "5I56x", version, len(data), running, number, 0) + data + stream


def read_all(file: StreamFile, size: int = 1000) -> bytes:
    data = bytearray()
    view = memoryview(bytearray(size))
    while count := file.receive_into(view):
        data += view[:count]
    return bytes(data)


def in_file(path: Path, data: bytes, offset: int = 0) -> tuple[StreamFile, bytes]:
    path.write_bytes(data)
    with path.open("rb", buffering=0) as opened:
        file = StreamFile(opened.fileno(), offset)
        return file, read_all(file)


def through_pipe(data: bytes) -> tuple[StreamFile, bytes]:
    theirs, ours = os.pipe()
    with os.fdopen(ours, "wb") as writing, os.fdopen(theirs, "rb", buffering=0) as reading:

        def write() -> None:
            with writing:
                writing.write(data[:7])
                writing.flush()
                writing.write(data[7:])

        thread = threading.Thread(target=write)
        thread.start()
        file = StreamFile(reading.fileno())
        found = read_all(file)
        thread.join()
        return file, found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b", ("/a/b", 0)),
        ("/a,b", ("/a,b", 0)),
        ("/a,offset=0", ("/a", 0)),
        ("/a,offset=4096", ("/a", 4096)),
        ("/a,offset=0x10790", ("/a", 0x10790)),
        ("/a,offset=64K", ("/a", 65536)),
    ],
)
def test_an_offset_behind_a_path(text: str, expected: tuple[str, int]) -> None:
    assert split_offset(text) == expected


@pytest.mark.parametrize("text", ["/a,offset=", "/a,offset=-1", "/a,offset=0xg", "/a,offset=1,offset=2"])
def test_an_offset_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not an offset: expected bytes, as in offset=4096"):
        split_offset(text)


@pytest.mark.parametrize("data", [b"", b"Q", b"Libvirt", STREAM], ids=["empty", "short", "nearly", "stream"])
def test_other_files_are_read_as_they_are(data: bytes, tmp_path: Path) -> None:
    for file, found in (in_file(tmp_path / "file", data), through_pipe(data)):
        assert found == data
        assert (file.image, file.origin) == (None, 0)


def test_a_stream_at_an_offset(tmp_path: Path) -> None:
    file, found = in_file(tmp_path / "file", bytes(5000) + STREAM, 5000)
    assert found == STREAM
    assert file.origin == 5000


@pytest.mark.parametrize(
    ("number", "name", "compress"),
    [(0, "raw", bytes), (1, "gzip", gzip.compress), (2, "bzip2", bz2.compress), (3, "xz", lzma.compress)],
)
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
def test_a_save_image(number: int, name: str, compress: Callable[[bytes], bytes], order: str, tmp_path: Path) -> None:
    data = image(compress(STREAM), number=number, order=order)
    for file, found in (in_file(tmp_path / "image", data), through_pipe(data)):
        assert found == STREAM
        assert file.image == SaveImage(name, True, len(XML) + 65536)
        assert file.origin == 92 + len(XML) + 65536


def test_a_save_image_at_an_offset(tmp_path: Path) -> None:
    file, found = in_file(tmp_path / "image", bytes(512) + image(), 512)
    assert found == STREAM
    assert file.origin == 512 + 92 + len(XML) + 65536


def test_passing_over_bytes(tmp_path: Path) -> None:
    for number, compress in ((0, bytes), (1, gzip.compress)):
        path = tmp_path / "image"
        path.write_bytes(image(compress(STREAM), number=number))
        with path.open("rb", buffering=0) as opened:
            file = StreamFile(opened.fileno())
            file.skip(300)
            assert read_all(file) == STREAM[300:]
    path.write_bytes(STREAM)
    with path.open("rb", buffering=0) as opened:
        file = StreamFile(opened.fileno())
        file.skip(10)  # within what was read to look for a header
        file.skip(290)
        assert read_all(file) == STREAM[300:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            image(magic=b"LibvirtQemudPart"),
            "an incomplete libvirt save image: 'virsh save' failed or is still writing it",
        ),
        (image()[:50], "cut in its header of 92"),
        (image(version=3), "of a version above 2"),
        (image(number=7), "of format 7: expected at most 6"),
        (image(number=5), r"zstd compressed.*'tail -c \+65639 FILE \| zstd -dc > STREAM'"),
        (image(number=4), "lzop compressed"),
    ],
)
def test_a_save_image_that_cannot_be_read(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=reason):
        in_file(tmp_path / "image", data)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("02000000 34070100 01000000 00000000 48060000", SaveImage("raw", True, 0x10734)),  # libvirt 9.0
        ("02000000 a8060100 01000000 06000000 bc050000", SaveImage("sparse", True, 0x106A8)),  # libvirt 11.3
    ],
)
def test_headers_that_libvirt_wrote(head: str, expected: SaveImage) -> None:
    assert parse_save_image(b"LibvirtQemudSave" + bytes.fromhex(head) + bytes(56)) == expected


def test_the_first_version_is_not_compressed() -> None:
    found = parse_save_image(image(version=1, running=0, number=9)[:92])
    assert found == SaveImage("raw", False, len(XML) + 65536)


def test_compressed_data_that_is_cut_ends_there(tmp_path: Path) -> None:
    _, found = in_file(tmp_path / "image", image(gzip.compress(os.urandom(50000))[:-2000], number=1))
    assert 0 < len(found) < 50000


@pytest.mark.parametrize(("number", "head"), [(1, b"\x1f\x8b\x08\0"), (2, b"BZh9"), (3, b"\xfd7zXZ\0")])
def test_compressed_data_that_is_damaged(number: int, head: bytes, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the compressed stream is damaged"):
        in_file(tmp_path / "image", image(head + b"\xff" * 5000, number=number))
