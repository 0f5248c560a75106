"""Section handlers: who writes and reads the body of a section, and the registry that finds them.

The engine frames sections (type, id, name, version, footer); a handler writes and reads bodies and knows nothing of the
frame. The callbacks are those of QEMU's SaveVMHandlers (include/migration/register.h). All but `covers` are abstract:
what is optional is a Protocol of its own, asked for with isinstance.

    LiveHandler    START/PART/END: sent while the guest runs (RAM, dirty bitmaps, storage)
    StateHandler   FULL: sent once, when the guest has stopped (devices)

Threads: the source's callbacks run in the migration thread, the destination's in the incoming thread. What a callback
raises fails the migration; `cleanup` and `load_cleanup` are then called and must succeed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from corefw.channel import Channel, Interrupt
from corefw.errors import PluginError
from corefw.settings import Settings
from corefw.wire.stream import StreamReader, StreamWriter


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
    new_ram_blocks   on a destination: also the blocks that the stream brings (corefw.machine.MakesRamBlocks)
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


class OutgoingContext(Protocol):
    """What the engine offers to a LiveHandler on the source, from setup() to cleanup()."""

    settings: Settings
    interrupt: Interrupt

    def open_channel(self) -> Channel:
        """One more channel to the destination. Raises ChannelError where the transport has only one."""

    def throttle_guest(self, percent: int) -> None:
        """Slow the guest down by `percent` (0 to 99) of its time. Raises MachineError where the machine cannot."""


class IncomingContext(Protocol):
    """What the engine offers to handlers on the destination, from load_setup() to load_cleanup().

    stream_capabilities   those that the stream's configuration section names, which change what sections consist of;
                          known once load() is called
    """

    settings: Settings
    interrupt: Interrupt
    stream_capabilities: frozenset[str]

    def accept_channel(self) -> Channel:
        """Wait for one more channel from the source."""

    def send_return_message(self, message: int, body: bytes) -> None:
        """Write one return-path message whole; from any thread. Raises ChannelError."""


class SectionHandler(ABC):
    """One section of the stream.

    version_id        written into the header
    minimum_version   the oldest that load() understands; the engine refuses the others
    priority          see Priority; equal ones go in the order in which they were registered
    """

    idstr: str
    instance_id: int = 0
    version_id: int
    minimum_version: int
    priority: int

    @property
    def key(self) -> SectionKey:
        return SectionKey(self.idstr, self.instance_id)

    def covers(self) -> Coverage:
        """Which of the machine's RAM blocks and devices this section carries, on either side; may be asked at any time.

        The engine refuses a migration of which some RAM block or device is carried by nobody. State that belongs to the
        plugin and not to the machine is none of that: the default.
        """
        return Coverage()

    @abstractmethod
    def required(self) -> bool:
        """On the destination: whether a stream without this section is refused."""

    @abstractmethod
    def load_setup(self, context: IncomingContext) -> None:
        """Before anything of the stream is loaded."""

    @abstractmethod
    def load(self, reader: StreamReader, version_id: int) -> None:
        """Read one body to its end, and not one byte more. `version_id` came in this section's START or FULL header."""

    @abstractmethod
    def load_cleanup(self) -> None:
        """After the stream, whether it was loaded or failed. Does not raise."""


class LiveHandler(SectionHandler):
    """A section that is sent in passes while the guest runs."""

    @abstractmethod
    def active(self) -> bool:
        """On the source: whether there is anything to send; asked once, before setup (SaveVMHandlers.is_active)."""

    @abstractmethod
    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        """Write the START body; begin to log what changes from here on."""

    @abstractmethod
    def pending(self, threshold: int) -> Pending:
        """What is left. Where what is known to be left is at most `threshold` bytes, the dirty log is harvested first,
        so the answer is exact. A negative threshold never harvests: what is known will do."""

    @abstractmethod
    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        """Write one PART body of about `budget` bytes, at least some; True when nothing known to be dirty is left."""

    @abstractmethod
    def complete_precopy(self, writer: StreamWriter) -> None:
        """The guest is stopped: write the END body with everything that is left."""

    @abstractmethod
    def cleanup(self) -> None:
        """After the migration, however it ended; stop logging. Does not raise."""


class StateHandler(SectionHandler):
    """A section that is sent whole when the guest has stopped."""

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


@runtime_checkable
class TakesChannels(Protocol):
    """A handler for which the source opens more channels: the destination goes on listening until the stream has ended.

    Who dials in meanwhile is not known to be the source: what comes over such a channel is as hostile as the stream.
    The engine aborts and closes them all.
    """

    def takes_channels(self) -> bool:
        """On the destination: whether accept_channel() will be called; asked once, before load_setup()."""


@runtime_checkable
class SupportsPostcopy(Protocol):
    """A LiveHandler whose rest may follow after the guest runs on the destination."""

    def follows_later(self) -> bool:
        """On the source: whether that is so in this migration, by its settings; asked once, when the guest has
        stopped (SaveVMHandlers.has_postcopy). Where not, complete_precopy() is called, as without postcopy."""

    def begin_postcopy(self, writer: StreamWriter) -> None:
        """The guest is stopped, before the package: tell the destination what to discard."""

    def complete_postcopy(self, writer: StreamWriter) -> None:
        """Write the END body once everything was sent."""


@runtime_checkable
class SupportsResume(Protocol):
    """A LiveHandler that can go on over a new channel after the old one broke."""

    def prepare_resume(self, writer: StreamWriter) -> None:
        """Find out what the destination has, and send the rest. In postcopy a ChannelError out of any callback on
        either side only pauses the migration; then this is called on the same handler, over a new channel."""


@runtime_checkable
class HasRamStatistics(Protocol):
    """A handler that counts pages, for query-migrate."""

    def ram_statistics(self) -> RamStatistics: ...


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


class SectionRegistry:
    """The handlers of one migration, in the order of the stream, found by (idstr, instance_id)."""

    def __init__(self, handlers: Iterable[SectionHandler] = ()) -> None:
        self._by_key: dict[SectionKey, SectionHandler] = {}
        for handler in handlers:
            self.add(handler)

    def add(self, handler: SectionHandler) -> None:
        if handler.key in self._by_key:
            raise PluginError(f"two handlers claim section {handler.key}: give one of them another instance_id")
        self._by_key[handler.key] = handler

    def find(self, key: SectionKey) -> SectionHandler | None:
        return self._by_key.get(key)

    def __iter__(self) -> Iterator[SectionHandler]:
        return iter(sorted(self._by_key.values(), key=lambda handler: -handler.priority))

    def live(self) -> list[LiveHandler]:
        return [handler for handler in self if isinstance(handler, LiveHandler)]

    def state(self) -> list[StateHandler]:
        return [handler for handler in self if isinstance(handler, StateHandler)]
