"""Read the device state of a QEMU to the end of the stream, without knowing the devices.

Invariant: either the whole device state is read, or an error is raised. If the source waits for an answer instead of
closing, nothing marks the end of the stream, so the strongest available sign counts:

    the description    its text ends with the last byte that arrived, and everything before it can be split: the end
    footers and EOF    all sections end with their footers, then the EOF byte, and nothing more for
                       QUIET_WITH_FOOTERS seconds
    EOF alone          that byte, and nothing more for QUIET_WITHOUT seconds. A stream that breaks off after any zero
                       byte looks the same, so QEMU's defaults (description, footers) should stay on

Threads: the incoming thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from corefw.errors import RemoteStreamError, StreamError
from corefw.machine import WaitReadable
from corefw.wire import items
from corefw.wire.constants import MAX_DESCRIPTION, SectionType
from corefw.wire.cutting import FOOTER_SIZE, find_description
from corefw.wire.decoder import MAX_DEVICE_STATE, decode_sections
from corefw.wire.stream import StreamReader

QUIET_WITH_FOOTERS: Final = 0.5
QUIET_WITHOUT: Final = 2.0
STALLED: Final = 30.0
"""Seconds of silence in the middle of the device state after which the load fails: the source's guest is stopped by
then, so the source has nothing to do but send."""

_EOF: Final = bytes((SectionType.EOF,))


@dataclass(frozen=True, slots=True)
class StoredDevice:
    """A device section. `size`: bytes on the wire, including header and footer."""

    name: str
    instance_id: int
    version: int
    size: int


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Everything from the first device section to the end of the stream.

    pieces    the sections' bytes: one piece for each if they could be split, else one for all of them
    devices   the device of each piece; empty if they could not be split
    end       EOF and description; b"" in a package, which has neither
    """

    pieces: tuple[bytes, ...] = ()
    devices: tuple[StoredDevice, ...] = ()
    end: bytes = b""


def take_device_state(reader: StreamReader, footers: bool, live: WaitReadable) -> DeviceState:
    """Read everything up to the end of the stream. Raises RemoteStreamError, ChannelError."""
    base = reader.offset
    reader.where = "device state"
    return cut_device_state(_take(reader, footers, live), base, footers)


def _take(reader: StreamReader, footers: bool, live: WaitReadable) -> bytes:
    held = bytearray()
    last_zero = -1
    while True:
        start, end = reader.span()
        if start == end:
            ended = _may_have_ended(held, footers)
            if ended and not live(QUIET_WITH_FOOTERS if footers else QUIET_WITHOUT) and _is_whole(held, footers):
                return bytes(held)
            if not live(STALLED):
                raise reader.error("more of the device state", f"nothing for {STALLED:.0f} seconds")
            if not reader.fill():
                return bytes(held)
            continue
        zero = reader.buffer.rfind(0, start, end)
        last_zero = last_zero if zero < 0 else len(held) + zero - start
        held += memoryview(reader.buffer)[start:end]
        reader.skip(end - start)
        if len(held) > MAX_DEVICE_STATE + MAX_DESCRIPTION:
            raise reader.error(f"at most {MAX_DEVICE_STATE >> 20} MiB of device state", "more")
        if find_description(held, last_zero) is not None:
            return bytes(held)


def _may_have_ended(held: bytearray, footers: bool) -> bool:
    if not held.endswith(_EOF):
        return False
    return not footers or held[-1 - FOOTER_SIZE : -FOOTER_SIZE] == bytes((SectionType.FOOTER,))


def _is_whole(held: bytearray, footers: bool) -> bool:
    """Whether the sections can be told apart up to EOF; without footers this is not checked any further."""
    try:
        cut_device_state(bytes(held), 0, footers)
    except StreamError:
        return False
    return True


def cut_device_state(data: bytes, base: int, footers: bool) -> DeviceState:
    """Split the sections, and check that they are complete. `base` is the offset of `data` in its stream. Raises
    RemoteStreamError."""
    return _cut(data, decode_sections(data, base=base, footers=footers), base, ends=True)


def cut_package(data: bytes, footers: bool) -> DeviceState:
    """Split the device sections of a postcopy package; see cut_device_state()."""
    return _cut(data, decode_sections(data, footers=footers, package=True), 0, ends=False)


def _cut(data: bytes, found: Iterable[items.Item], base: int, *, ends: bool) -> DeviceState:
    """`ends`: the last section is followed by EOF."""
    starts: list[items.Section] = []
    tail, uncut = len(data), False
    for item in found:
        match item:
            case items.Section():
                starts.append(item)
            case items.Eof():
                tail = item.offset - base
            case items.Uncut():
                uncut, tail = True, len(item.data) - (len(_EOF) if ends else 0)
            case items.Body() | items.Footer() | items.DescriptionItem():
                pass
            case _:
                raise RemoteStreamError(item.offset, "device state", "device sections", type(item).__name__)
    if uncut:
        return DeviceState((data[:tail],), (), data[tail:])
    bounds = [section.offset - base for section in starts] + [tail]
    pieces = [data[first:end] for first, end in pairwise(bounds)]
    return DeviceState(tuple(pieces), _devices(starts, pieces), data[tail:])


def _devices(starts: Sequence[items.Section], pieces: Sequence[bytes]) -> tuple[StoredDevice, ...]:
    return tuple(
        StoredDevice(one.header.idstr, one.header.instance_id, one.header.version_id, len(piece))
        for one, piece in zip(starts, pieces, strict=True)
    )
