"""The saver and the loader of section 'ram': what the engine calls, passed on to save.py and load.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from corefw.errors import MachineError
from corefw.machine import FaultSource, Machine, RamBlock, RamMakingMachine
from corefw.postcopy import FaultServer, PreemptLoader, PreemptSaver, ReleasingSaver
from corefw.section import Coverage, IncomingContext, OutgoingContext, Pending, Priority, RamSaver, RamStatistics
from corefw.wire.constants import RAM_IDSTR, RAM_VERSION, TARGET_PAGE_SIZE
from corefw.wire.stream import StreamReader, StreamWriter
from corefw_ram.kernel import find_kernel
from corefw_ram.postcopy_load import PostcopyPageLoader
from corefw_ram.postcopy_save import PostcopyPageSaver
from corefw_ram.requested import load_requested
from corefw_ram.save import EOS


class RamSectionSaver(RamSaver, PreemptSaver, ReleasingSaver):
    """The source's half of QEMU's savevm_ram_handlers, for any machine's RAM blocks."""

    idstr = RAM_IDSTR
    version_id = RAM_VERSION
    priority = Priority.RAM

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._pages: PostcopyPageSaver | None = None
        self._follows_later = False
        self._statistics = RamStatistics()
        find_kernel()  # as in the loader

    def covers(self) -> Coverage:
        return Coverage(
            ram_blocks=frozenset(block.idstr for block in self._machine.ram_blocks()),
            new_ram_blocks=isinstance(self._machine, RamMakingMachine),
        )

    def active(self) -> bool:
        return True

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        self._follows_later = context.settings.capability("postcopy-ram")
        if self._follows_later:
            find_kernel()  # reads the entry points of everything installed, so not while the guest waits for a page
        self._pages = PostcopyPageSaver(_checked(self._machine.ram_blocks()), self._statistics)
        if context.settings.capability("release-ram"):
            self._pages.releasing()
        self._pages.setup(writer, page_sizes=self._follows_later)

    def pending_estimate(self) -> Pending:
        left = self._statistics.remaining_bytes
        return Pending(0, left) if self._follows_later else Pending(left, 0)

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

    def follows_later(self) -> bool:
        return self._follows_later

    def prepare_postcopy(self, writer: StreamWriter) -> None:
        self._saving.prepare_postcopy(writer)

    def begin_postcopy(self, writer: StreamWriter) -> None:
        self._saving.begin_postcopy(writer)

    def request_pages(self, block: str, start: int, length: int) -> None:
        self._saving.request(block, start, length)

    def send_requested(self, writer: StreamWriter, block: str, start: int, length: int) -> None:
        self._saving.send_requested(writer, block, start, length)

    def serve_requests(self, reader: StreamReader, writer: StreamWriter, block: str) -> str:
        return self._saving.serve_requests(reader, writer, block)

    def end_requested(self, writer: StreamWriter) -> None:
        writer.write(EOS)

    def mark(self) -> None:
        self._saving.releasing().mark()

    def release(self) -> None:
        self._saving.releasing().release()

    def release_all(self) -> None:
        self._saving.releasing().release_all()

    def prepare_resume(self, received: Callable[[str, int], NDArray[np.bool_]]) -> None:
        self._saving.prepare_resume(received)

    def ram_statistics(self) -> RamStatistics:
        return self._statistics

    @property
    def _saving(self) -> PostcopyPageSaver:
        assert self._pages is not None, "called before setup()"
        return self._pages


class RamSectionLoader(PreemptLoader):
    """The destination's half of QEMU's savevm_ram_handlers, for any machine's RAM blocks."""

    idstr = RAM_IDSTR
    version_id = RAM_VERSION
    minimum_version = RAM_VERSION

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._pages: PostcopyPageLoader | None = None
        self._loaded = False
        find_kernel()  # reads the entry points of everything installed, so not while a migration waits for it

    def covers(self) -> Coverage:
        """All of the machine's RAM; none of it if a source has sent bodies without the list of blocks."""
        if self._loaded and self._pages is not None and not self._pages.listed:
            return Coverage()
        return Coverage(
            ram_blocks=frozenset(block.idstr for block in self._machine.ram_blocks()),
            new_ram_blocks=isinstance(self._machine, RamMakingMachine),
        )

    def required(self) -> bool:
        return True

    def setup(self, context: IncomingContext) -> None:
        _checked(self._machine.ram_blocks())
        self._pages = PostcopyPageLoader(self._machine, context)

    def load(self, reader: StreamReader, version_id: int) -> None:
        if version_id != RAM_VERSION:
            raise reader.error(f"version {RAM_VERSION} of section '{RAM_IDSTR}'", f"version {version_id}")
        self._loading.load(reader)
        self._loaded = True

    def discard(self, block: str, start: int, length: int) -> None:
        self._loading.discard(block, start, length)

    def listen(self, faults: FaultSource) -> None:
        self._loading.listen(faults)

    def connection_lost(self) -> None:
        """The marks of what has arrived stay."""

    def load_requested(self, reader: StreamReader) -> None:
        load_requested(reader, self._loading.arriving)

    def wait_for(self, block: str, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._loading.arriving(block).wait_for(pages)

    def fault_server(self) -> FaultServer | None:
        return self._loading.fault_server()

    def outstanding(self, block: str) -> NDArray[np.int64]:
        return self._loading.arriving(block).marks.outstanding()

    def received(self, block: str) -> NDArray[np.bool_]:
        return self._loading.arriving(block).marks.received()

    def statistics(self) -> Mapping[str, object]:
        """In postcopy: bytes of RAM that have not arrived."""
        pages = self._pages  # cleanup() may come at any moment
        missing = pages.missing() if pages is not None else None
        return {"missing": missing} if missing is not None else {}

    def cleanup(self) -> None:
        self._pages = None

    @property
    def _loading(self) -> PostcopyPageLoader:
        assert self._pages is not None, "called before setup()"
        return self._pages


def _checked(blocks: Sequence[RamBlock]) -> Sequence[RamBlock]:
    """Raises MachineError for a block that the stream has no records for."""
    for block in blocks:
        if block.page_size != TARGET_PAGE_SIZE:
            raise MachineError(
                f"RAM block '{block.idstr}' has pages of {block.page_size} bytes, expected {TARGET_PAGE_SIZE}"
            )
    return blocks
