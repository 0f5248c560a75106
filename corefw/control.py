"""What a plugin may see and do of a running engine: its events, its reports, and MigrationControl."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corefw.dispatch import Event, Observer
from corefw.machine import Machine, RunState
from corefw.settings import Settings
from corefw.states import MigrationStatus, Side

if TYPE_CHECKING:
    from corefw.section import RamStatistics


@dataclass(frozen=True, slots=True)
class PassBegan(Event):
    """The source begins a pass over the guest's memory; the first is number 1."""

    number: int


@dataclass(frozen=True, slots=True)
class RunStateChanged(Event):
    """The guest's run state changed."""

    old: RunState
    new: RunState


@dataclass(frozen=True, slots=True)
class PostcopySwitch:
    """How a migration came to switch to postcopy.

    reason      a phrase
    after       milliseconds since the migration began
    passes      the number of the pass that was being sent, or was about to be
    remaining   bytes of state that were still to be sent
    """

    reason: str
    after: int
    passes: int
    remaining: int


@dataclass(frozen=True, slots=True)
class ReconnectReport:
    """A paused source that dials its destination again by itself.

    attempts   number of those so far
    limit      number after which it gives up; None: never
    wait       milliseconds until the next one; 0 while it dials
    """

    attempts: int
    limit: int | None
    wait: int


@dataclass(frozen=True, slots=True)
class TransferReport:
    """The figures of a migration away from here, at one moment.

    Sizes are bytes, rates bytes per second, times milliseconds. "State" is what the live sections have to send: a page
    of zeros counts as a whole page. None stands for "not known".

    total_time          since the migration began; of one that has ended, until its end
    setup_time          until the destination had accepted the sections
    downtime            for how long the guest was stopped; 0 until the migration has completed
    expected_downtime   how long the guest would be stopped if the switchover came now (QEMU's estimate)
    transferred         bytes in the stream
    precopy_bytes       those that were sent before the guest was stopped
    postcopy_bytes      those that were sent after the guest was handed over in postcopy
    mbps                megabits per second in the stream
    pages_per_second    pages of RAM
    ram                 a copy of the counters of RAM's section
    total               the most state that was ever left, over all sections
    remaining           state left as of the last look of the migration thread
    remaining_now       the same, with what RAM's section has found since the guest was stopped
    send_rate           state that is sent in a second
    dirty_rate          state that the guest writes in a second
    time_left           until the guest runs on the destination; None as well if the migration does not converge
    pass_time_left      until the present pass has been sent
    pass_downtime       how long it would take to send what the last pass began with
    converges           False: passes do not get smaller, and what is left does not fit into the downtime limit
    guest               once completed: "moved" (confirmed), "stored" (whole in a file) or "unconfirmed"; "" before
    warnings            sentences: what the user who started the migration should know
    switch              when and why it switched to postcopy; None before, and in precopy
    reconnect           set while a postcopy is paused and goes on by itself
    """

    total_time: int
    setup_time: int
    downtime: int
    expected_downtime: int
    transferred: int
    precopy_bytes: int
    postcopy_bytes: int
    mbps: float
    pages_per_second: int
    ram: RamStatistics
    total: int
    remaining: int
    remaining_now: int
    send_rate: float
    dirty_rate: float | None
    time_left: float | None
    pass_time_left: float | None
    pass_downtime: float | None
    converges: bool | None
    guest: str
    warnings: tuple[str, ...]
    switch: PostcopySwitch | None = None
    reconnect: ReconnectReport | None = None


@dataclass(frozen=True, slots=True)
class BlocktimeReport:
    """How long a guest has waited for its pages in postcopy (capability postcopy-blocktime). Times are nanoseconds.

    Threads are in the order in which they first waited. Only faults whose page had to be requested count.

    blocktime              in which all of these threads waited at once
    blocktime_of_threads   in which each of them waited
    faults                 number of faults that are over
    waiting                number of faults that are not
    average                of the latency of a fault
    average_of_threads     the same for each thread
    average_of_others      the same for threads that are not the guest's own, together
    distribution           number of faults by latency: element n has those of 2**n to 2**(n+1) microseconds
    median, p99, longest   of the latencies
    """

    blocktime: int
    blocktime_of_threads: tuple[int, ...]
    faults: int
    waiting: int
    average: int
    average_of_threads: tuple[int, ...]
    average_of_others: int
    distribution: tuple[int, ...]
    median: int
    p99: int
    longest: int


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """How a migration goes, or went.

    side              SOURCE if a migration away from here was ever started, else DESTINATION
    status            that side's
    error             why it failed, was cancelled or is paused, or is about to fail
    blocked_reasons   why a migration away from here would be refused; empty while one runs
    sections          what each section reports of itself (Section.statistics), by name
    transfer          figures of the source; None on a destination
    blocktime         how long the guest has waited for pages; None on a source, and without postcopy-blocktime
    warning           what the user of a destination should know; empty if there is nothing
    """

    side: Side
    status: MigrationStatus
    error: str | None = None
    blocked_reasons: tuple[str, ...] = ()
    sections: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    transfer: TransferReport | None = None
    blocktime: BlocktimeReport | None = None
    warning: str = ""


@dataclass(frozen=True, slots=True)
class AllocationReport:
    """How much of the RAM of a destination that waits is allocated.

    allocated   bytes
    total       bytes of RAM
    running     more is being allocated now
    """

    allocated: int
    total: int
    running: bool


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Whether a migration would succeed, and what it would be like. None stands for "not known".

    problems            why it would not succeed, as sentences; empty: it would
    notes               what may matter, as sentences
    ram                 bytes of RAM
    ram_used            bytes of it that are allocated
    dirty_rate          bytes that the guest writes in a second
    destination         what the destination says of itself: host, versions, free memory
    bandwidth           bytes per second, measured
    round_trip          milliseconds
    converges           whether passes get smaller until the rest fits into the downtime limit
    expected_time       milliseconds until the guest runs there
    expected_downtime   milliseconds
    passes              over the guest's memory
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    ram: int
    ram_used: int
    dirty_rate: int | None
    destination: Mapping[str, object] | None
    bandwidth: int | None
    round_trip: float | None
    converges: bool | None
    expected_time: int | None
    expected_downtime: int | None
    passes: int | None


class MigrationControl(ABC):
    """The engine, as the QMP commands of plugins see it. May be called from any thread, observers included.

    name       the engine's name; "" if it has none
    machine    the guest; only its methods that look may be called
    settings   the engine's settings, to read; change them with set_capabilities() and set_parameters()
    """

    name: str
    machine: Machine
    settings: Settings

    @abstractmethod
    def status(self, side: Side) -> MigrationStatus:
        """The status of the migration away from here (Side.SOURCE) or to here (Side.DESTINATION)."""

    @abstractmethod
    def report(self) -> MigrationReport:
        """How the migration goes, or went: the one away from here if any was started, else the one to here."""

    @abstractmethod
    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call `observer(event)` for every StatusChanged, PassBegan and RunStateChanged from now on; the function
        returned ends that.

        Events come in order, one at a time, in a thread that caused one, with no lock held. What the observer raises is
        logged.
        """

    @abstractmethod
    def stop(self) -> None:
        """Pause the guest. Does nothing if it is not running. Raises MachineError."""

    @abstractmethod
    def cont(self) -> None:
        """Let the guest run. Raises StateError if it is not here, or may be running elsewhere; MachineError."""

    @abstractmethod
    def migrate(self, uri: str) -> None:
        """Start to send the guest away; returns once it has started.

        Raises UsageError (nothing was started): StateError, BlockedError, UriError, SettingsError; and PluginError.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Begin to cancel the migration, on either side. Does nothing if there is none. Raises StateError in postcopy,
        when neither side has the whole guest."""

    @abstractmethod
    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """Switch capabilities, all of them or none. Raises StateError while a migration runs, SettingsError."""

    @abstractmethod
    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Change parameters, all of them or none; also while a migration runs. Raises SettingsError."""

    @abstractmethod
    def add_blocker(self, reason: str) -> None:
        """Refuse migrations for this reason until it is removed. Raises StateError while a migration runs, UsageError
        under only-migratable."""

    @abstractmethod
    def remove_blocker(self, reason: str) -> None:
        """Does nothing if the reason is not there."""
