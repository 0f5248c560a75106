"""The contract for machines: what a migration moves, with RAM blocks and devices, and can be stopped and started.

The engine knows no more about a machine than this module says. A machine that can do more inherits from
VerifiableMachine, ThrottlableMachine, PostcopyMachine, BlockMachine, BlockMakingMachine,
RamMakingMachine or ParkingMachine.

Threads: whatever only reads (`name`, `run_state`, `ram_blocks`, `devices`, `information`) may be called from any thread
at any time. Everything else is called from the engine's threads, one call at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from corefw.block import BlockNode
    from corefw.section import SectionKey
    from corefw.wire.stream import StreamReader
    from corefw.wire.vmstate import VMState


class RunState(StrEnum):
    """Those of QEMU's run states that a machine can be in here."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    SHUTDOWN = "shutdown"
    INTERNAL_ERROR = "internal-error"


DEAD: Final = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR})
"""The run states of a guest that has ended; no other state follows."""


class DirtyLog(ABC):
    """The log of which pages of one RAM block the guest has written."""

    @abstractmethod
    def start(self) -> None:
        """Begin to log. Whatever is written from now on is in a later harvest."""

    @abstractmethod
    def harvest(self) -> NDArray[np.int64]:
        """Return the pages written since the last harvest, or since start(), as runs of page numbers.

        A run is a row (first, end) with `end` exclusive; rows are ascending and apart. A write that happens during the
        call is in this harvest or in the next.
        """

    def harvest_within(self, runs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Harvest these runs of pages, which takes less time than harvesting the whole block if the log can do that;
        this default harvests everything. Pages outside may be reported as well; a write that is not stays in the log.
        """
        return self.harvest()

    @abstractmethod
    def stop(self) -> None:
        """Stop logging. Idempotent; does not raise."""


class ComparingLog(DirtyLog):
    """A dirty log that compares contents. It is exact only if it knows what was sent: a page may change, be sent, and
    change back between two harvests."""

    @abstractmethod
    def sent(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Note the bytes that were sent for these pages: shape (n, page_size), rows may be strided."""


class RamBlock(ABC):
    """A piece of guest RAM: shared memory behind a file descriptor (usually a memfd), mapped by the engine.

    idstr       the name in the stream, at most 255 bytes
    length      bytes, a multiple of page_size
    page_size   bytes of a target page: 4096 in every stream that is read and written here
    fd          file descriptor of the memory, to read and write the RAM
    view        writable memoryview of the engine's mapping
    pages       the same as an array of shape (pages, page_size), dtype uint8
    dirty_log   the log of what the guest has written; what the engine writes is not in it
    host_page_size   bytes of the pages that the guest's host has mapped the block with: page_size, or a huge page's. In
                postcopy a destination like that host needs whole ones. Set by the loader where the stream says so
    huge        the memory is in huge pages: a first write through the mapping costs little
    known_zero  runs (first, end) of pages that are zero although some of them were allocated in advance; None where
                only the holes are known to be zero. What loads the block counts on it, so it is set before and reset
                after (corefw.memory.preallocation)
    """

    idstr: str
    length: int
    page_size: int
    fd: int
    view: memoryview
    pages: NDArray[np.uint8]
    dirty_log: DirtyLog
    host_page_size: int = 4096
    huge: bool = False
    known_zero: NDArray[np.int64] | None = None

    @abstractmethod
    def holes(self) -> NDArray[np.int64]:
        """Runs (first, end) of pages that were never touched. They are zero; do not read them, because that would
        allocate them."""

    def zeros(self) -> NDArray[np.int64]:
        """Runs (first, end) of pages that are known to be zero without reading them. Asked before a load."""
        return self.holes() if self.known_zero is None else self.known_zero

    @abstractmethod
    def store(self, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Write `data` (shape (n, page_size), rows may be strided) to the pages with these numbers."""

    @abstractmethod
    def fill(self, pages: NDArray[np.int64], value: int) -> None:
        """Set every byte of these pages to one value. Zero never allocates a page, and may free some."""

    @abstractmethod
    def release(self, runs: NDArray[np.int64]) -> None:
        """Give the memory of the pages in these runs (rows first, end) back to the host. They are zero afterwards, in
        every process that maps them. Raises MachineError."""


@dataclass(frozen=True, slots=True)
class GuestMapping:
    """Where a guest has mapped a RAM block, for compiled code that installs pages itself (UFFDIO_CONTINUE).

    userfaultfd   a descriptor, open until the FaultSource is closed; -1 if the guest waits for no pages
    address       the block's first byte in the guest's process
    """

    userfaultfd: int
    address: int


class FaultStage(IntEnum):
    """What can happen to a page fault; the numbers are those of compiled code."""

    BEGAN = 0
    """A thread of the guest waits for the page."""
    INSTALLED = 1
    """The guest sees the page, which had to be requested."""
    WAS_HERE = 2
    """The page had arrived before the fault, and is about to be installed."""


class FaultEvent(NamedTuple):
    """What compiled code has seen of a page fault.

    when     in nanoseconds, as time.monotonic_ns() has it
    thread   the id of the thread that began to wait, as the kernel reports it; otherwise 0
    """

    when: int
    stage: FaultStage
    block: str
    page: int
    thread: int


class FaultSource(ABC):
    """The page faults of a guest that runs while its RAM is still arriving (postcopy).

    A thread of the guest that accesses a page waits until that page is installed. What the engine writes to a block
    stays invisible to the guest until then, so a page may be received in pieces, and more than once.
    """

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable when poll() has something to return."""

    @abstractmethod
    def poll(self) -> Mapping[str, NDArray[np.int64]]:
        """Return the pages that threads of the guest have begun to wait for since the last call, by block.

        Shape (n, 2): rows (page number, id of the thread) in ascending order, without repetitions. The id is 0 for a
        thread that is not the guest's own, or not known. Does not block.
        """

    @abstractmethod
    def install(self, block: RamBlock, runs: NDArray[np.int64]) -> None:
        """Let the guest see the pages in these runs (rows first, end) as they are in the block, and wake the threads
        that wait for them. Does nothing for installed pages, or if the guest has ended. Raises MachineError."""

    def mapping(self, block: RamBlock) -> GuestMapping | None:
        """How compiled code can install pages of this block without install(), which is slower. None if it cannot."""
        del block
        return None

    def own_thread(self, thread: int) -> int:
        """The id of a thread whose fault compiled code has read, as poll() would return it."""
        del thread
        return 0

    def note(self, events: Sequence[FaultEvent]) -> None:
        """Compiled code has served faults, in this order. Most sources have no use for that."""
        del events

    @abstractmethod
    def release(self) -> None:
        """Let the guest see all of its RAM as it is: everything has arrived, or the guest will not run with this. Ends
        the source as close() does. Does not raise."""

    @abstractmethod
    def close(self) -> None:
        """Serve no more faults: a guest that accesses a page that is not installed waits until it is ended. Idempotent;
        does not raise."""


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What `migfw run` passes to a machine's entry point: `factory(config) -> Machine`, in run state PRELAUNCH, or
    INMIGRATE when `incoming`.

    program    the PROGRAM argument, or None
    options    --opt K=V, as text; the machine checks them all and raises UsageError, naming the wrong one
    allow_undeclared   migrate even if some of the program's state stays behind. A machine that runs no program refuses
                       it with UsageError
    only_migratable    end the guest with an error if it gets into a state that cannot migrate
    """

    program: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    incoming: bool = False
    allow_undeclared: bool = False
    only_migratable: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """A device's state for the `devices` plugin: sent as section (name, instance_id) by the table `vmstate` from the
    attributes of `state`."""

    name: str
    instance_id: int
    vmstate: VMState
    state: object


class Machine(ABC):
    """A guest.

    kind      name of the entry point: "python", "qemu"
    options   what `--opt K=V` gave, as text, for plugins. Set by Plugins.machine()
    programs  names of programs that come with it, for Tab completion
    """

    kind: str
    programs: ClassVar[Sequence[str]] = ()
    options: Mapping[str, str] = MappingProxyType({})

    @property
    @abstractmethod
    def name(self) -> str:
        """The machine type, sent in the configuration section. A destination with another one refuses the guest."""

    @property
    @abstractmethod
    def run_state(self) -> RunState: ...

    @abstractmethod
    def ram_blocks(self) -> Sequence[RamBlock]: ...

    @abstractmethod
    def devices(self) -> Sequence[Device]:
        """The same devices at any time. Their states are current while the guest is stopped; a destination loads them
        before start()."""

    @abstractmethod
    def start(self) -> None:
        """Let the guest run, on a destination with what was loaded. After a MachineError it does not run."""

    @abstractmethod
    def stop(self, state: RunState) -> None:
        """Stop the guest, unless it is stopped, and enter `state`.

        When this returns, the guest executes nothing, its devices() are current, and its RAM does not change. If it
        raises MachineError, the guest keeps running.
        """

    @abstractmethod
    def set_run_state(self, state: RunState) -> None:
        """Enter another state; the guest does not run (POSTMIGRATE after a migration)."""

    @abstractmethod
    def watch(self, observer: Callable[[RunState, RunState], None]) -> None:
        """Call `observer(old, new)` after every change of run state, in the thread that made it, with no lock held."""

    @abstractmethod
    def information(self) -> Mapping[str, object]:
        """What `migfw status` shows: JSON values by name, at least "ram" with the sizes by block."""

    def layout_document(self) -> bytes:
        """What the guest consists of, as UTF-8 text in a format of the machine's own. `migfw check` has a destination
        compare it with its own. b"" if RAM blocks and sections say everything."""
        return b""

    def compare_layout(self, there: bytes) -> tuple[list[str], list[str]]:
        """Compare with the layout_document() of a source: the reasons why its guest cannot run here, and what else may
        matter, as phrases. `there` comes from the peer and may be anything. Does not raise."""
        del there
        return [], []

    @abstractmethod
    def close(self) -> None:
        """End the guest and free everything. Idempotent; does not raise."""


class PostcopyMachine(Machine):
    """A machine that can run while its RAM is still arriving."""

    @abstractmethod
    def postcopy_unsupported(self) -> str | None:
        """Why the guest's page faults cannot be served on this host, and what to do about it; None if they can. Called
        on a destination."""

    def postcopy_notes(self) -> Sequence[str]:
        """What else matters for postcopy on this host, as sentences. Called after postcopy_unsupported()."""
        return ()

    @abstractmethod
    def watch_faults(self) -> FaultSource:
        """Have the guest wait whenever it accesses a page that is not installed; at first none is. Called on a
        destination, before start(). Raises MachineError."""


class BlockMachine(Machine):
    """A machine with disks. Their contents do not move with it: both sides have access to them. Their dirty bitmaps do,
    with capability dirty-bitmaps."""

    @abstractmethod
    def block_nodes(self) -> Sequence[BlockNode]:
        """The disks, in the order of their declaration. May be called from any thread; the nodes outlive the guest."""

    def find_node(self, name: str) -> BlockNode | None:
        """The node of the device with this name, or else the node with this name; None if there is none."""
        nodes = self.block_nodes()
        by_device = (node for node in nodes if node.device == name and name)
        return next(by_device, None) or next((node for node in nodes if node.name == name), None)


class BlockMakingMachine(BlockMachine):
    """A machine that, as a destination, takes whatever block nodes the bitmaps in the stream belong to."""

    @abstractmethod
    def make_block_node(self, name: str, length: int) -> BlockNode:
        """Make a node of `length` bytes without data beside those that the machine has. Raises MachineError."""


class VerifiableMachine(Machine):
    """A machine that can prove its own state."""

    @abstractmethod
    def verify(self) -> Mapping[str, object]:
        """Check the guest, stopping it meanwhile if it runs; return what was checked, as JSON values.

        Raises MachineError, which says what is wrong. It has to find a single page that is older than the rest of the
        guest: that is what a lost write looks like.
        """


class ThrottlableMachine(Machine):
    """A machine whose guest can be slowed down."""

    @abstractmethod
    def throttle(self, percent: int) -> None:
        """Let the guest run for only 100 - `percent` of the time (0 to 99); 0 ends it. Raises MachineError."""


class RamMakingMachine(Machine):
    """A machine that, as a destination, takes whatever RAM the stream brings."""

    @abstractmethod
    def make_ram_blocks(self, lengths: Mapping[str, int]) -> Sequence[RamBlock]:
        """Make new empty blocks of these lengths, in bytes, beside those that the machine has: all of them, or raise
        MachineError. Check limits before allocating anything."""

    @abstractmethod
    def discard_loaded(self) -> None:
        """Free everything that a stream brought, because loading it failed. Idempotent; does not raise."""


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """How a stream was framed, to frame it the same way when it is sent on.

    configuration        it had a configuration section (QEMU's send-configuration)
    footers              it had section footers (QEMU's send-section-footer)
    configuration_tail   the configuration section's subsections as they came; empty: none
    section_ids          ids of its live sections, which the stored sections do not use
    switchover_start     it had SWITCHOVER_START before the END sections (QEMU's send-switchover-start, 10.0 and later)
    """

    configuration: bool
    footers: bool
    configuration_tail: bytes
    section_ids: Mapping[SectionKey, int]
    switchover_start: bool = False


WaitReadable = Callable[[float], bool]


class ParkingMachine(PostcopyMachine):
    """A machine that cannot run here: its RAM is loaded, and its devices stay in the bytes that their emulator sent.

    As a destination it takes any machine; as a source it sends on what it took (corefw.engine.tails.StoredTail). It
    takes part in postcopy on either side: nothing here accesses the RAM that is still arriving.
    """

    def devices(self) -> Sequence[Device]:
        """None: they are among stored_sections()."""
        return ()

    @abstractmethod
    def adopt_sections(self, name: str, stream_format: StreamFormat, reader: StreamReader, live: WaitReadable) -> None:
        """Take everything up to the end of the stream, EOF byte and description included.

        Called with the reader just before the type byte of the first section that no loader knows. The live sections
        are behind it, with an END each or, in a background snapshot, without. `name` is the machine type ("" if the
        stream has no configuration section). `live(seconds)` is False if nothing more came for that long: a source that
        waits for SHUT does not end its stream. Raises RemoteStreamError, ChannelError.
        """

    @abstractmethod
    def adopt_package(self, name: str, stream_format: StreamFormat, sections: bytes) -> None:
        """Take the device sections of a postcopy's package: no EOF byte, no description. The live sections are still to
        end. `name` as for adopt_sections(). Raises RemoteStreamError."""

    @abstractmethod
    def stored_format(self) -> StreamFormat | None:
        """How to frame the stream when the machine is sent on; None to follow the settings."""

    @abstractmethod
    def stored_sections(self) -> Sequence[bytes]:
        """The device sections that were taken, byte for byte."""

    @abstractmethod
    def stored_end(self) -> bytes:
        """EOF byte and description as they came behind the device sections; b"" if these came in a package."""
