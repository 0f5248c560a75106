"""The configuration section: the machine type, and subsections for other things that both sides have to agree on.

Source: QEMU 7.2, vmstate_configuration (migration/savevm.c).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from corefw.errors import StreamError
from corefw.wire.constants import BE32, MAX_CONFIGURATION_CAPABILITIES, MAX_MACHINE_NAME, SectionType
from corefw.wire.stream import MemorySource, StreamReader, StreamWriter

UUID_SIZE: Final = 16
_CAPABILITIES: Final = "configuration/capabilities"
PAGE_BITS: Final = range(10, 17)
"""Target pages from 1 KiB, the smallest of QEMU's Arm targets, to 64 KiB."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The machine type, and the subsections byte for byte (empty: none)."""

    name: str
    tail: bytes = b""


def _read_target_page_bits(reader: StreamReader) -> bytes:
    raw = reader.read(4, "the target page bits")
    (bits,) = BE32.unpack(raw)
    if bits not in PAGE_BITS:
        raise reader.error(f"target pages of {PAGE_BITS[0]} to {PAGE_BITS[-1]} bits", f"{bits}")
    return raw


def _read_capabilities(reader: StreamReader) -> bytes:
    count = reader.be32("the number of capabilities")
    if count > MAX_CONFIGURATION_CAPABILITIES:
        raise reader.error(f"at most {MAX_CONFIGURATION_CAPABILITIES} capabilities", f"{count}")
    raw = bytearray(BE32.pack(count))
    for _ in range(count):
        length = reader.u8("the length of a capability's name")
        raw += bytes((length,)) + reader.read(length, "a capability's name")
    return bytes(raw)


def _read_uuid(reader: StreamReader) -> bytes:
    return reader.read(UUID_SIZE, "the machine's UUID")


CONFIGURATION_SUBSECTIONS: Final[Mapping[str, Callable[[StreamReader], bytes]]] = {
    "configuration/target-page-bits": _read_target_page_bits,
    _CAPABILITIES: _read_capabilities,
    "configuration/uuid": _read_uuid,
}
"""Name -> function that reads the body. Bodies carry no length, so an unknown subsection cannot be skipped."""


def read_configuration_body(reader: StreamReader) -> Configuration:
    """Read the rest of the section, with all subsections. Raises RemoteStreamError."""
    length = reader.be32("the length of the machine's name")
    raw = reader.read(length, "the machine's name", MAX_MACHINE_NAME)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise reader.error("the machine's name as text", repr(raw)) from None
    if not name.isprintable():
        raise reader.error("a machine's name that can be printed", repr(name))
    tail = bytearray()
    seen: set[str] = set()
    while reader.peek(1) == bytes((SectionType.SUBSECTION,)):
        tail += _read_configuration_subsection(reader, seen)
    return Configuration(name, bytes(tail))


def _read_configuration_subsection(reader: StreamReader, seen: set[str]) -> bytes:
    reader.u8("the type of a subsection")
    name = reader.string("the name of a configuration subsection")
    if name not in CONFIGURATION_SUBSECTIONS:
        raise reader.error(
            f"a configuration subsection that is known ({', '.join(CONFIGURATION_SUBSECTIONS)})", f"'{name}'"
        )
    if name in seen:
        raise reader.error("each configuration subsection once", f"'{name}' again")
    seen.add(name)
    version = reader.be32(f"the version of '{name}'")
    encoded = name.encode()
    head = bytes((SectionType.SUBSECTION, len(encoded))) + encoded + BE32.pack(version)
    return head + CONFIGURATION_SUBSECTIONS[name](reader)


def write_configuration(writer: StreamWriter, configuration: Configuration) -> None:
    """Write the whole section, with its type byte."""
    name = configuration.name.encode()
    if len(name) > MAX_MACHINE_NAME:
        raise StreamError(f"the machine's name '{configuration.name}' is longer than {MAX_MACHINE_NAME} bytes")
    writer.u8(SectionType.CONFIGURATION)
    writer.be32(len(name))
    writer.write(name)
    writer.write(configuration.tail)


def without_capabilities(configuration: Configuration, names: AbstractSet[str]) -> Configuration:
    """The configuration without these capabilities, and without their subsection if none is left."""
    kept = [name.encode() for name in sorted(configuration_capabilities(configuration) - names)]
    tail = bytearray()
    for name, raw in _raw_subsections(configuration):
        if name != _CAPABILITIES:
            tail += raw
        elif kept:
            tail += raw[: _head_size(raw)] + BE32.pack(len(kept)) + b"".join(bytes((len(one),)) + one for one in kept)
    return Configuration(configuration.name, bytes(tail))


def _raw_subsections(configuration: Configuration) -> Iterator[tuple[str, bytes]]:
    """The subsections of the tail: names, and bytes from the type byte on."""
    reader = StreamReader(MemorySource(configuration.tail), size=max(len(configuration.tail), 1))
    while not reader.at_end():
        raw = _read_configuration_subsection(reader, set())
        yield raw[2 : 2 + raw[1]].decode(), raw


def _head_size(raw: bytes) -> int:
    """The number of bytes of a subsection's type, name and version."""
    return 2 + raw[1] + BE32.size


def configuration_subsections(configuration: Configuration) -> dict[str, bytes]:
    """The bodies of the subsections by name."""
    return {name: raw[_head_size(raw) :] for name, raw in _raw_subsections(configuration)}


def select_subsections(configuration: Configuration, names: Collection[str]) -> bytes:
    """The tail with only these subsections, byte for byte."""
    return b"".join(raw for name, raw in _raw_subsections(configuration) if name in names)


def configuration_page_size(configuration: Configuration) -> int | None:
    """Bytes of a target page; None without `configuration/target-page-bits`, which only targets whose page size varies
    send."""
    body = configuration_subsections(configuration).get("configuration/target-page-bits")
    return None if body is None else 1 << int(BE32.unpack(body)[0])


def configuration_capabilities(configuration: Configuration) -> frozenset[str]:
    """The capabilities in `configuration/capabilities`: those of the source that change the layout of the stream."""
    body = configuration_subsections(configuration).get(_CAPABILITIES, bytes(BE32.size))
    names = set()
    at = BE32.size
    while at < len(body):
        end = at + 1 + body[at]
        names.add(body[at + 1 : end].decode(errors="replace"))
        at = end
    return frozenset(names)
