"""Section savers and loaders: what writes and what reads the body of a section.

The engine frames sections (type, id, name, version, footer). A saver writes bodies on the source, a loader reads them
on the destination, and neither knows anything of the frame. The callbacks are those of QEMU's SaveVMHandlers
(include/migration/register.h, QEMU 10.0), split by direction.

    LiveSaver    LiveLoader     START/PART/END: sent in passes while the guest runs (RAM, dirty bitmaps, storage)
    StateSaver   StateLoader    FULL: sent once, when the guest has stopped (devices)

What is optional is a class to inherit from: RamSaver, RunStateSaver, and likewise for loaders. Those whose rest may
follow while the guest already runs on the destination are in corefw.postcopy.

Threads: a saver's callbacks run in the migration thread, a loader's in the incoming thread; statistics() may be called
from any. An exception from a callback fails the migration. Then, as after a success, cleanup() is called, and last of
all exactly one of committed() and abandoned().
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from corefw.channel import Channel, Interrupt
from corefw.settings import Settings
from corefw.wire.stream import StreamReader, StreamWriter

if TYPE_CHECKING:
    from corefw.machine import RunState


class SectionKey(NamedTuple):
    """What names a section: ("ram", 0)."""

    idstr: str
    instance_id: int

    def __str__(self) -> str:
        return f"'{self.idstr}' (instance {self.instance_id})"


@dataclass(frozen=True, slots=True)
class Pending:
    """Bytes still to send.

    must_precopy   has to be there before the guest starts on the destination
    can_postcopy   may follow afterwards
    """

    must_precopy: int
    can_postcopy: int

    @property
    def total(self) -> int:
        return self.must_precopy + self.can_postcopy


@dataclass(frozen=True, slots=True)
class Coverage:
    """The parts of the machine that a section carries.

    ram_blocks       their idstrs
    devices          their (name, instance_id)
    new_ram_blocks   on a destination: also the blocks that the stream brings (corefw.machine.RamMakingMachine)
    """

    ram_blocks: frozenset[str] = frozenset()
    devices: frozenset[SectionKey] = frozenset()
    new_ram_blocks: bool = False


class Priority:
    """Where in the stream a section goes: higher first (QEMU's MigrationPriority, with room between)."""

    EARLY: Final = 300
    RAM: Final = 200
    DEVICES: Final = 100
    LATE: Final = 0


class OutgoingContext(ABC):
    """What the engine offers to a LiveSaver on the source, from setup() to cleanup()."""

    settings: Settings
    interrupt: Interrupt

    @abstractmethod
    def open_channel(self) -> Channel:
        """Open one more channel to the destination, metered as the stream's own is. From any thread. Raises
        ChannelError if the transport has only one. The engine aborts and closes it with the connection."""

    @abstractmethod
    def send_command(self, number: int, payload: bytes) -> None:
        """Send a command in front of the next section; from the migration thread.

        `number` is one of PLUGIN_COMMANDS that the section's loader takes, or a Command of QEMU's that belongs to the
        section; `payload` is below 64 KiB.
        """

    @abstractmethod
    def throttle_guest(self, percent: int) -> None:
        """Slow the guest down by `percent` (0 to 99) of its time. Raises MachineError if the machine cannot."""


class IncomingContext(ABC):
    """What the engine offers to loaders on the destination, from setup() to cleanup().

    stream_capabilities   those that change what sections consist of: named by the stream's configuration section, and
                          postcopy-ram if POSTCOPY_ADVISE announced pages; known once load() is called
    """

    settings: Settings
    interrupt: Interrupt
    stream_capabilities: frozenset[str]

    @abstractmethod
    def accept_channel(self) -> Channel:
        """Wait for one more channel from the source. From any thread. Raises ChannelError, Interrupted. The engine
        aborts it when the load fails, before cleanup(), and closes it with the connection."""

    @abstractmethod
    def send_return_message(self, message: int, body: bytes) -> None:
        """Write one return-path message whole; from any thread. `message` is one of PLUGIN_MESSAGES that the section's
        saver has a handler for, `body` at most 512 bytes. Raises ChannelError."""


class Section(ABC):
    """What the two directions of a section have in common.

    idstr         the section's name in the stream, 1 to 255 bytes of UTF-8
    instance_id   tells sections of one name apart
    version_id    savers write it into the header; for loaders, the newest version that load() understands
    """

    idstr: str
    instance_id: int = 0
    version_id: int

    @property
    def key(self) -> SectionKey:
        return SectionKey(self.idstr, self.instance_id)

    def covers(self) -> Coverage:
        """The machine's RAM blocks and devices that this section carries; may be asked at any time.

        The engine refuses a migration that would leave a RAM block or device behind. The default, nothing, is right for
        state that belongs to the plugin and not to the machine.
        """
        return Coverage()

    def statistics(self) -> Mapping[str, object]:
        """Figures of this section for query-migrate (x-migfw.sections): names with "-", JSON values. Any thread."""
        return {}

    def committed(self) -> None:  # noqa: B027 - optional
        """The migration took place: the guest belongs to the destination, or to the file it was sent to. Called last of
        all, after cleanup(). Exceptions are logged."""

    def abandoned(self) -> None:  # noqa: B027 - optional
        """The migration failed or was cancelled, or its outcome is unknown: the source keeps what it has, the
        destination discards what it loaded.

        Called last of all, after cleanup(). Exceptions are logged.
        """


class SectionSaver(Section):
    """The source's half of one section, for one migration. Inherit from LiveSaver or StateSaver.

    priority   see Priority; equal ones go in the order in which they were registered
    """

    priority: int

    def return_messages(self) -> Mapping[int, Callable[[bytes], None]]:
        """Handlers of the section's own return-path messages, by number; asked for each connection, before setup().

        The section's loader sends such a message with IncomingContext.send_return_message(). Its number is one of
        corefw.wire.constants.PLUGIN_MESSAGES. A handler is called with the body, of at most 512 bytes, in the return
        path's thread; an exception from it fails the migration. The default is to have no messages.
        """
        return {}


class LiveSaver(SectionSaver):
    """A section that is sent in passes while the guest runs. committed() or abandoned() follows if setup() was called,
    even if it raised."""

    @abstractmethod
    def active(self) -> bool:
        """Whether there is anything to send; asked once, before setup (SaveVMHandlers.is_active)."""

    @abstractmethod
    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        """Write the START body; begin to log what changes from here on."""

    @abstractmethod
    def pending_estimate(self) -> Pending:
        """What is known to be left. Cheap: asked several times a pass, and harvests nothing
        (SaveVMHandlers.state_pending_estimate)."""

    @abstractmethod
    def pending_exact(self) -> Pending:
        """Harvest the dirty log, then say what is left; a new pass begins. Called when the estimates of all sections
        together fit into the downtime limit (SaveVMHandlers.state_pending_exact)."""

    @abstractmethod
    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        """Write one PART body of about `budget` bytes, at least some; True when nothing known to be dirty is left."""

    @abstractmethod
    def complete(self, writer: StreamWriter) -> None:
        """The guest is stopped: harvest once more and write the END body with everything that is left
        (SaveVMHandlers.save_live_complete_precopy)."""

    @abstractmethod
    def cleanup(self) -> None:
        """Stop logging and release resources, however the migration ended. Must not raise."""


class StateSaver(SectionSaver):
    """A section that is sent whole when the guest has stopped. committed() or abandoned() follows in any migration that
    was started, whether the section was needed() or not."""

    @abstractmethod
    def blocked(self) -> str | None:
        """Why this device cannot migrate, or None (VMStateDescription.unmigratable)."""

    @abstractmethod
    def needed(self) -> bool:
        """Whether the section is sent at all."""

    @abstractmethod
    def save(self, writer: StreamWriter) -> None:
        """Write the FULL body."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the description at the stream's end says of the body that save() wrote last: vmsd_name, version, fields,
        subsections; name and instance_id are added by the engine."""


class RamSaver(LiveSaver):
    """The saver whose counters query-migrate reports as "ram". At most one in a migration."""

    @abstractmethod
    def ram_statistics(self) -> RamStatistics:
        """The counters, always the same object. Asked once, after setup()."""


class RunStateSaver(StateSaver):
    """The saver of the guest's run state."""

    @abstractmethod
    def store(self, run_state: RunState) -> None:
        """Keep the state to be sent; called before the guest is stopped for the migration (global_state_store)."""


@dataclass(slots=True)
class RamStatistics:
    """The counters of QEMU's RAMState, in pages unless said otherwise. Written by the migration thread, read by any.

    dirtied   pages that all harvests found together; a page that two of them found counts twice
    """

    page_size: int = 4096
    total_bytes: int = 0
    remaining_bytes: int = 0
    normal: int = 0
    duplicate: int = 0
    dirty_sync_count: int = 0
    dirty_pages_rate: int = 0
    dirtied: int = 0
    postcopy_requests: int = 0


class SectionLoader(Section):
    """The destination's half of one section, for one migration. Inherit from LiveLoader or StateLoader.

    minimum_version   the oldest that load() understands; the engine refuses anything older or newer than version_id

    committed() or abandoned() follows if setup() was called, even if it raised.
    """

    minimum_version: int

    def commands(self) -> Mapping[int, Callable[[bytes], None]]:
        """Handlers of the commands that belong to the section, by number; asked before setup().

        The section's saver sends such a command with OutgoingContext.send_command(). Its number is one of
        corefw.wire.constants.PLUGIN_COMMANDS, or a Command of QEMU's that the engine does not run itself. A handler is
        called with the payload, between two sections, in the incoming thread; an exception from it fails the migration.
        The default is to have no commands.
        """
        return {}

    @abstractmethod
    def required(self) -> bool:
        """Whether a stream without this section is refused."""

    @abstractmethod
    def setup(self, context: IncomingContext) -> None:
        """Prepare to load; called when a source has connected, before anything of its stream is loaded."""

    @abstractmethod
    def load(self, reader: StreamReader, version_id: int) -> None:
        """Read one body to its end, and not one byte more. `version_id` came in this section's START or FULL header."""

    @abstractmethod
    def cleanup(self) -> None:
        """Release resources after the stream, whether it was loaded or failed. Must not raise."""


class LiveLoader(SectionLoader):
    """Reads what a LiveSaver writes: load() is called for its START, each PART, and its END."""


class StateLoader(SectionLoader):
    """Reads what a StateSaver writes: load() is called for its FULL."""


class RunStateLoader(StateLoader):
    """The loader of the run state that the source's guest was in."""

    @abstractmethod
    def run_state(self) -> RunState | None:
        """What was received, or None; asked after the stream."""


class MultiChannelLoader(LiveLoader):
    """A loader for which the source opens more channels: the destination goes on listening until the stream has ended.

    Anyone may connect meanwhile, so what comes over such a channel is as hostile as the stream.
    """

    @abstractmethod
    def takes_channels(self) -> bool:
        """Whether accept_channel() will be called; asked when the first section comes."""
