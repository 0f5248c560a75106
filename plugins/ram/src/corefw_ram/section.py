"""The saver and the loader of section 'ram': what the engine calls, passed on to save.py and load.py."""

from __future__ import annotations

from collections.abc import Sequence

from corefw.errors import MachineError
from corefw.machine import Machine, MakesRamBlocks, RamBlock
from corefw.section import (
    Coverage,
    IncomingContext,
    LiveLoader,
    OutgoingContext,
    Pending,
    Priority,
    RamSaver,
    RamStatistics,
)
from corefw.wire.constants import RAM_IDSTR, RAM_VERSION, TARGET_PAGE_SIZE
from corefw.wire.stream import StreamReader, StreamWriter
from corefw_ram.load import PageLoader
from corefw_ram.save import PageSaver


class RamSectionSaver(RamSaver):
    """The source's half of QEMU's savevm_ram_handlers, for any machine's RAM blocks."""

    idstr = RAM_IDSTR
    version_id = RAM_VERSION
    priority = Priority.RAM

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._pages: PageSaver | None = None
        self._statistics = RamStatistics()

    def covers(self) -> Coverage:
        return Coverage(
            ram_blocks=frozenset(block.idstr for block in self._machine.ram_blocks()),
            new_ram_blocks=isinstance(self._machine, MakesRamBlocks),
        )

    def active(self) -> bool:
        return True

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self._pages = PageSaver(_checked(self._machine.ram_blocks()), self._statistics)
        self._pages.setup(writer)

    def pending_estimate(self) -> Pending:
        return Pending(must_precopy=self._statistics.remaining_bytes, can_postcopy=0)

    def pending_exact(self) -> Pending:
        self._saving.harvest()
        return self.pending_estimate()

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        return self._saving.iterate(writer, budget)

    def complete(self, writer: StreamWriter) -> None:
        self._saving.complete(writer)

    def cleanup(self) -> None:
        if self._pages is not None:
            self._pages.cleanup()
            self._pages = None

    def ram_statistics(self) -> RamStatistics:
        return self._statistics

    @property
    def _saving(self) -> PageSaver:
        assert self._pages is not None, "called before setup()"
        return self._pages


class RamSectionLoader(LiveLoader):
    """The destination's half of QEMU's savevm_ram_handlers, for any machine's RAM blocks."""

    idstr = RAM_IDSTR
    version_id = RAM_VERSION
    minimum_version = RAM_VERSION

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._pages: PageLoader | None = None
        self._loaded = False

    def covers(self) -> Coverage:
        """All of the machine's RAM; none of it if a source has sent bodies without the list of blocks."""
        if self._loaded and self._pages is not None and not self._pages.listed:
            return Coverage()
        return Coverage(
            ram_blocks=frozenset(block.idstr for block in self._machine.ram_blocks()),
            new_ram_blocks=isinstance(self._machine, MakesRamBlocks),
        )

    def required(self) -> bool:
        return True

    def setup(self, context: IncomingContext) -> None:
        _checked(self._machine.ram_blocks())
        self._pages = PageLoader(self._machine, context)

    def load(self, reader: StreamReader, version_id: int) -> None:
        assert self._pages is not None, "load() before setup()"
        if version_id != RAM_VERSION:
            raise reader.error(f"version {RAM_VERSION} of section '{RAM_IDSTR}'", f"version {version_id}")
        self._pages.load(reader)
        self._loaded = True

    def cleanup(self) -> None:
        self._pages = None


def _checked(blocks: Sequence[RamBlock]) -> Sequence[RamBlock]:
    """Raises MachineError for a block that the stream has no records for."""
    for block in blocks:
        if block.page_size != TARGET_PAGE_SIZE:
            raise MachineError(
                f"RAM block '{block.idstr}' has pages of {block.page_size} bytes, expected {TARGET_PAGE_SIZE}"
            )
    return blocks
