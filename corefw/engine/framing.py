"""Frames sections on the source: type byte, header, body, footer. Collects the stream's description on the way.

Savers write bodies, and this module writes everything around them. A section keeps its id from START to END.

Source: QEMU 7.2, save_section_header, save_section_footer, qemu_savevm_state_* (migration/savevm.c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, Final

from corefw.engine.statistics import OutgoingStatistics
from corefw.section import LiveSaver, SectionKey, SectionSaver, StateSaver
from corefw.wire.constants import TARGET_PAGE_SIZE, SectionType
from corefw.wire.records import SectionHeader, write_command, write_footer, write_part_header, write_section_header
from corefw.wire.stream import StreamWriter


class SectionWriter:
    """Writes the sections of one stream. `ids` fixes the ids of some sections; the others get free ones."""

    def __init__(
        self, writer: StreamWriter, statistics: OutgoingStatistics, *, footers: bool, ids: Mapping[SectionKey, int]
    ) -> None:
        self._writer: Final = writer
        self._statistics: Final = statistics
        self._footers = footers
        self._ids = dict(ids)
        taken = set(ids.values())
        self._free = (number for number in count() if number not in taken)
        self._devices: list[dict[str, Any]] = []
        self._commands: list[tuple[int, bytes]] = []

    def onto(self, writer: StreamWriter) -> SectionWriter:
        """The same sections in another writer: a package's, or that of the connection that a migration resumes over."""
        other = SectionWriter(writer, self._statistics, footers=self._footers, ids={})
        other._ids, other._free = self._ids, self._free
        other._devices, other._commands = self._devices, self._commands
        return other

    def start(self, saver: LiveSaver, body: Callable[[], None]) -> None:
        self._whole(SectionType.START, saver, body)

    def command(self, number: int, payload: bytes) -> None:
        """A command in front of the next section, or behind the section whose body is being written."""
        self._commands.append((number, payload))

    def part(self, saver: LiveSaver, body: Callable[[], bool]) -> bool:
        """Write one PART; returns what the body returned."""
        self.write_commands()
        began = self._writer.position
        write_part_header(self._writer, SectionType.PART, self._id(saver))
        finished = body()
        self._footer(saver)
        self._count(saver, began)
        return finished

    def end(self, saver: LiveSaver) -> None:
        self.write_commands()
        began = self._writer.position
        write_part_header(self._writer, SectionType.END, self._id(saver))
        saver.complete(self._writer)
        self._footer(saver)
        self._count(saver, began)

    def full(self, saver: StateSaver) -> None:
        self._whole(SectionType.FULL, saver, lambda: saver.save(self._writer))
        self._devices.append({"name": saver.idstr, "instance_id": saver.instance_id} | saver.describe())

    def stored(self, section: bytes) -> None:
        """A whole FULL section, as it came."""
        self._writer.write(section)

    def description(self) -> dict[str, Any]:
        """Describe the FULL sections written so far."""
        return {"page_size": TARGET_PAGE_SIZE, "devices": self._devices}

    def write_commands(self) -> None:
        """Write what command() was given."""
        while self._commands:
            write_command(self._writer, *self._commands.pop(0))

    def _whole(self, kind: SectionType, saver: SectionSaver, body: Callable[[], None]) -> None:
        self.write_commands()
        began = self._writer.position
        header = SectionHeader(kind, self._id(saver), saver.idstr, saver.instance_id, saver.version_id)
        write_section_header(self._writer, header)
        body()
        self._footer(saver)
        self._count(saver, began)

    def _count(self, saver: SectionSaver, began: int) -> None:
        self._statistics.section(saver.key).sent += self._writer.position - began

    def _footer(self, saver: SectionSaver) -> None:
        if self._footers:
            write_footer(self._writer, self._id(saver))

    def _id(self, saver: SectionSaver) -> int:
        if saver.key not in self._ids:
            self._ids[saver.key] = next(self._free)
        return self._ids[saver.key]
