"""The handler of section 'ram': what the engine calls, passed on to the saver or the loader.

One handler serves one migration in one direction.
"""

from __future__ import annotations

from collections.abc import Sequence

from corefw.errors import MachineError
from corefw.machine import Machine, MakesRamBlocks, RamBlock
from corefw.section import (
    Coverage,
    IncomingContext,
    LiveHandler,
    OutgoingContext,
    Pending,
    Priority,
    RamStatistics,
)
from corefw.wire.constants import RAM_IDSTR, RAM_VERSION, TARGET_PAGE_SIZE
from corefw.wire.stream import StreamReader, StreamWriter
from corefw_ram.load import RamLoader
from corefw_ram.save import RamSaver


class RamHandler(LiveHandler):
    """QEMU's savevm_ram_handlers, for any machine's RAM blocks."""

    idstr = RAM_IDSTR
    version_id = RAM_VERSION
    minimum_version = RAM_VERSION
    priority = Priority.RAM

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._saver: RamSaver | None = None
        self._loader: RamLoader | None = None
        self._loaded = False
        self._statistics = RamStatistics()

    def covers(self) -> Coverage:
        """All of the machine's RAM; nothing of it where a source has sent bodies without the list of the blocks."""
        if self._loaded and self._loader is not None and not self._loader.listed:
            return Coverage()
        blocks = frozenset(block.idstr for block in self._machine.ram_blocks())
        return Coverage(ram_blocks=blocks, new_ram_blocks=isinstance(self._machine, MakesRamBlocks))

    def active(self) -> bool:
        return True

    def required(self) -> bool:
        return True

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self._saver = RamSaver(_checked(self._machine.ram_blocks()), self._statistics)
        self._saver.setup(writer)

    def pending(self, threshold: int) -> Pending:
        return Pending(must_precopy=self._saving.pending(threshold), can_postcopy=0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        return self._saving.iterate(writer, budget)

    def complete_precopy(self, writer: StreamWriter) -> None:
        self._saving.complete(writer)

    def cleanup(self) -> None:
        if self._saver is not None:
            self._saver.cleanup()
            self._saver = None

    def ram_statistics(self) -> RamStatistics:
        return self._statistics

    def load_setup(self, context: IncomingContext) -> None:
        _checked(self._machine.ram_blocks())
        self._loader = RamLoader(self._machine, context)

    def load(self, reader: StreamReader, version_id: int) -> None:
        assert self._loader is not None, "load() before load_setup()"
        if version_id != RAM_VERSION:
            raise reader.error(f"version {RAM_VERSION} of section '{RAM_IDSTR}'", f"version {version_id}")
        self._loader.load(reader)
        self._loaded = True

    def load_cleanup(self) -> None:
        self._loader = None

    @property
    def _saving(self) -> RamSaver:
        assert self._saver is not None, "called before setup()"
        return self._saver


def _checked(blocks: Sequence[RamBlock]) -> Sequence[RamBlock]:
    """Raises MachineError for a block that the stream has no records for."""
    for block in blocks:
        if block.page_size != TARGET_PAGE_SIZE:
            raise MachineError(
                f"RAM block '{block.idstr}' has pages of {block.page_size} bytes, expected {TARGET_PAGE_SIZE}"
            )
    return blocks
