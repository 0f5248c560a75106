"""What a plugin may see and do of a running engine: its events, and MigrationControl."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from corefw.dispatch import Event, Observer
from corefw.machine import Machine, RunState
from corefw.settings import Settings
from corefw.states import MigrationStatus, Side


@dataclass(frozen=True, slots=True)
class PassBegan(Event):
    """The source begins a pass over the guest's memory; the first is number 1."""

    number: int


@dataclass(frozen=True, slots=True)
class RunStateChanged(Event):
    """The guest's run state changed."""

    old: RunState
    new: RunState


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
        """Begin to cancel the migration, on either side. Does nothing if there is none."""

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
