"""The stream's header, section headers, footers and the description.

Source: QEMU 7.2, qemu_loadvm_state, save_section_header, check_section_footer (migration/savevm.c).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from corefw.wire.constants import (
    BE32,
    FILE_MAGIC,
    FILE_VERSION,
    FILE_VERSION_OBSOLETE,
    MAX_DESCRIPTION,
    MULTIFD_MAGIC,
    SectionType,
)
from corefw.wire.stream import StreamReader, StreamWriter


def read_header(reader: StreamReader) -> None:
    """Check magic and version. Raises RemoteStreamError with what was found."""
    magic = reader.peek(4)
    if magic == BE32.pack(MULTIFD_MAGIC):
        raise reader.error("a migration stream", "a channel of multifd (switch capability 'multifd' off on the source)")
    if len(magic) == 4 and magic != BE32.pack(FILE_MAGIC):
        hint = " (a libvirt save image? give its path as file:PATH)" if magic == b"Libv" else ""
        raise reader.error("a migration stream, beginning with 'QEVM'", f"bytes {magic.hex(' ')}{hint}")
    reader.be32("the magic number")
    version = reader.be32("the stream's version")
    if version == FILE_VERSION_OBSOLETE:
        raise reader.error(
            f"version {FILE_VERSION}", f"version {version}, which is obsolete (send it again from a newer QEMU)"
        )
    if version != FILE_VERSION:
        raise reader.error(f"version {FILE_VERSION}", f"version {version}")


def write_header(writer: StreamWriter) -> None:
    writer.be32(FILE_MAGIC)
    writer.be32(FILE_VERSION)


_BRACE: Final = ord("{")

WITH_NAME: Final = frozenset({SectionType.START, SectionType.FULL})
WITHOUT_NAME: Final = frozenset({SectionType.PART, SectionType.END})


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """The header of a START or FULL section."""

    type: SectionType
    section_id: int
    idstr: str
    instance_id: int
    version_id: int

    def __str__(self) -> str:
        return f"section {self.section_id} '{self.idstr}' (instance {self.instance_id})"


def read_section_header(reader: StreamReader, section_type: SectionType) -> SectionHeader:
    """Read the header of a START or FULL section, after the type byte."""
    assert section_type in WITH_NAME
    section_id = reader.be32("a section's id")
    idstr = reader.string("a section's name")
    if not idstr.isprintable():
        raise reader.error("a section's name that can be printed", repr(idstr))
    return SectionHeader(
        section_type, section_id, idstr, reader.be32("a section's instance id"), reader.be32("a section's version")
    )


def peek_section_header(reader: StreamReader) -> tuple[str, int] | None:
    """Name and instance id of the START or FULL section whose type byte comes next, without consuming anything; None if
    the stream ends inside the header."""
    head = reader.peek(6)
    if len(head) < 6:
        return None
    end = len(head) + head[5]
    whole = reader.peek(end + BE32.size)
    if len(whole) < end + BE32.size:
        return None
    return whole[6:end].decode(errors="replace"), int(BE32.unpack_from(whole, end)[0])


def write_section_header(writer: StreamWriter, header: SectionHeader) -> None:
    """Write type byte and header of START or FULL."""
    assert header.type in WITH_NAME
    writer.u8(header.type)
    writer.be32(header.section_id)
    writer.string(header.idstr)
    writer.be32(header.instance_id)
    writer.be32(header.version_id)


def read_part_header(reader: StreamReader) -> int:
    """Read the section's id, after the type byte of PART or END."""
    return reader.be32("a section's id")


def write_part_header(writer: StreamWriter, section_type: SectionType, section_id: int) -> None:
    """Write type byte and header of PART or END."""
    assert section_type in WITHOUT_NAME
    writer.u8(section_type)
    writer.be32(section_id)


def read_footer(reader: StreamReader, section_id: int, where: str) -> None:
    """Read type byte and id, which show that the body was read to its end. `where` names the section in errors."""
    reader.where = where
    mark = reader.peek(1)
    if mark and mark[0] != SectionType.FOOTER:
        raise reader.error(f"a footer (0x{SectionType.FOOTER:02x}) behind the section's body", f"0x{mark[0]:02x}")
    reader.u8("a section's footer")
    got = reader.be32("the id in a section's footer")
    if got != section_id:
        raise reader.error(f"the footer of section {section_id}", f"that of section {got}")


def write_footer(writer: StreamWriter, section_id: int) -> None:
    writer.u8(SectionType.FOOTER)
    writer.be32(section_id)


def read_description_body(reader: StreamReader) -> bytes:
    """Read the JSON text, after the type byte VMDESCRIPTION (see corefw.wire.description)."""
    length = reader.be32("the length of the description")
    return reader.read(length, "the description", MAX_DESCRIPTION)


def pad_description(text: bytes) -> bytes:
    """Make the JSON of a description findable for QEMU's scripts/analyze-migration.py.

    The script takes the first brace after the stream's last zero byte for the beginning of the JSON. A length that
    contains the byte of a brace, 0x7B, would mislead it, so spaces before the last brace change the length.
    """
    padding = 0
    while _BRACE in BE32.pack(len(text) + padding):
        padding += 1
    return text[:-1] + b" " * padding + text[-1:]


def write_description(writer: StreamWriter, description: Mapping[str, object] | bytes) -> None:
    """Write the whole section, with its type byte: an object as JSON, or JSON text unchanged."""
    text = description if isinstance(description, bytes) else pad_description(json.dumps(description).encode())
    writer.u8(SectionType.VMDESCRIPTION)
    writer.be32(len(text))
    writer.payload(text)
