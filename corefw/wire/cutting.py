"""Find the ends of device sections, which the stream does not mark.

The description gives the lengths. Without one, a section ends at a footer with its id, if what follows the footer can
follow a section. Reading the sections afterwards checks the result: every footer has to carry its section's id, and the
last section has to end where the stream ends.

Source: QEMU 7.2, save_section_header and qemu_savevm_state_complete_precopy (migration/savevm.c).
"""

from __future__ import annotations

from collections import deque
from typing import Final

from corefw.wire.constants import BE16, BE32, COMMAND_LENGTHS, MAX_DESCRIPTION, PLUGIN_COMMANDS, Command, SectionType
from corefw.wire.description import Description, DeviceDescription
from corefw.wire.records import SectionHeader

FOOTER_SIZE: Final = 5
DESCRIPTION_HEAD: Final = 5
_BRACE: Final = ord("{")
_UNBRACE: Final = ord("}")


class Cutter:
    """Measures the bodies of the sections in `data`, which extends to the end of the stream.

    `footers`: whether each body is followed by one; None: the first body shows it.
    """

    def __init__(self, data: bytes, description: Description | None = None, footers: bool | None = None) -> None:
        self._data = data
        self._footers = footers
        devices = description.devices if description else ()
        # isapc has two 'isa-ide' of one instance; they are described in the order of the stream.
        self._devices: dict[tuple[str, int], deque[DeviceDescription]] = {}
        for device in devices:
            self._devices.setdefault((device.name, device.instance_id), deque()).append(device)

    def measure(self, header: SectionHeader, at: int) -> tuple[int, DeviceDescription | None] | None:
        """The number of bytes of the body that begins at `at`, and its shape if the description has the right one. None
        if nothing says where it ends."""
        described = self._devices.get((header.idstr, header.instance_id))
        device = described.popleft() if described else None
        if device is not None and self._ends(header, at + device.state.size):
            return device.state.size, device
        # QEMU describes an array of pointers as if none of them were null. If some are, only the footer shows the end.
        end = self._find_footer(header, at) if self._footers is not False else None
        return None if end is None else (end - at, None)

    def _ends(self, header: SectionHeader, at: int) -> bool:
        """Whether the body ends where the description says: the section's footer is there or, without footers,
        something that may follow a section."""
        if self._footers is None:
            self._footers = at < len(self._data) and self._data[at] == SectionType.FOOTER
        if self._footers:
            return self._data.startswith(_footer(header), at)
        return at <= len(self._data) and self._plausible(at)

    def _find_footer(self, header: SectionHeader, at: int) -> int | None:
        footer = _footer(header)
        end = self._data.find(footer, at)
        while end >= 0:
            if self._plausible(end + FOOTER_SIZE):
                return end
            end = self._data.find(footer, end + 1)
        return None

    def _plausible(self, at: int) -> bool:
        """Whether what is here may follow a section: the end, EOF, a section with a printable name, a command."""
        data = self._data
        if at >= len(data):
            return True
        kind = data[at]
        if kind == SectionType.EOF:
            return at + 1 == len(data) or data[at + 1] == SectionType.VMDESCRIPTION
        if kind in (SectionType.START, SectionType.FULL):
            name = data[at + 6 : at + 6 + data[at + 5]] if at + 5 < len(data) else b""
            return bool(name) and name.isascii() and name.decode("ascii").isprintable()
        if kind in (SectionType.PART, SectionType.END):
            return at + 5 <= len(data)
        return kind == SectionType.COMMAND and self._is_command(at + 1)

    def _is_command(self, at: int) -> bool:
        if at + 4 > len(self._data):
            return False
        (number,), (length,) = BE16.unpack_from(self._data, at), BE16.unpack_from(self._data, at + 2)
        if number in PLUGIN_COMMANDS:
            return len(self._data) >= at + 4 + int(length)
        if number not in Command._value2member_map_:
            return False
        allowed = COMMAND_LENGTHS[Command(number)]
        return allowed is None or length in allowed


def _footer(header: SectionHeader) -> bytes:
    return bytes((SectionType.FOOTER,)) + BE32.pack(header.section_id)


def find_description(data: bytes | bytearray, last_zero: int | None = None) -> int | None:
    """The offset of a description section that ends exactly where `data` ends; None if there is none.

    JSON has no zero byte, but the description's length, which is below 2^24, has one. So the last zero of the stream is
    one of the four bytes of that length. `last_zero` is its offset if the caller knows it.
    """
    zero = data.rfind(0) if last_zero is None else last_zero
    for kind_at in range(max(zero - 4, 0), zero):
        text_at = kind_at + DESCRIPTION_HEAD
        if data[kind_at] == SectionType.VMDESCRIPTION and text_at < len(data):
            (length,) = BE32.unpack_from(data, kind_at + 1)
            if length == len(data) - text_at <= MAX_DESCRIPTION and data[text_at] == _BRACE and data[-1] == _UNBRACE:
                return kind_at
    return None
