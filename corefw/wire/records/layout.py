"""The section 'program-layout': the layout of a python guest's program, sent before its RAM.

START is a be32 length and that many bytes of JSON (docs/stream.md); PART and END are empty.
"""

from __future__ import annotations

from typing import Final

from corefw.wire.stream import StreamReader, StreamWriter

LAYOUT_IDSTR: Final = "program-layout"

MAX_LAYOUT: Final = 1 << 20


def read_layout(reader: StreamReader) -> bytes:
    length = reader.be32("the length of the layout")
    return reader.read(length, "the layout", MAX_LAYOUT)


def write_layout(writer: StreamWriter, text: bytes) -> None:
    writer.be32(len(text))
    writer.payload(text)
