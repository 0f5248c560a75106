"""The saver and the loader of a device's section, both driven by its VMState table.

They know only the device's table and state. The state is looked up when it is sent or loaded, because a machine may
return another object once it has stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corefw.errors import MachineError
from corefw.machine import Device, Machine
from corefw.section import Coverage, IncomingContext, Priority, Section, SectionKey, StateLoader, StateSaver
from corefw.wire.stream import StreamReader, StreamWriter
from corefw.wire.vmstate import VMState

State = Callable[[], object]
"""Returns the object with the attributes that a table names."""


class _DeviceSection(Section):
    def __init__(self, key: SectionKey, table: VMState, state: State) -> None:
        self.idstr, self.instance_id = key
        self.version_id = table.version_id
        self._table = table
        self._state = state

    def covers(self) -> Coverage:
        return Coverage(devices=frozenset({self.key}))


class DeviceSaver(_DeviceSection, StateSaver):
    def __init__(self, key: SectionKey, table: VMState, state: State) -> None:
        super().__init__(key, table, state)
        self.priority = Priority.DEVICES if table.priority is None else table.priority
        self._described: dict[str, Any] | None = None

    def blocked(self) -> str | None:
        reason = self._table.unmigratable
        return None if reason is None else f"'{self.idstr}': {reason}"

    def needed(self) -> bool:
        return self._table.is_needed(self._state())

    def save(self, writer: StreamWriter) -> None:
        """Raises MachineError for a value that does not fit its field."""
        self._described = self._table.save(writer, self._state())

    def describe(self) -> dict[str, Any]:
        assert self._described is not None, "describe() before save()"
        return self._described


class DeviceLoader(_DeviceSection, StateLoader):
    def __init__(self, key: SectionKey, table: VMState, state: State) -> None:
        super().__init__(key, table, state)
        self.minimum_version = table.oldest

    def required(self) -> bool:
        """Require the section unless its table has a condition (`needed`)."""
        return self._table.needed is None

    def setup(self, context: IncomingContext) -> None:
        pass

    def load(self, reader: StreamReader, version_id: int) -> None:
        reader.where = f"section {self.key}"
        self._table.load(reader, self._state(), version_id)

    def cleanup(self) -> None:
        pass


def device_section(machine: Machine, device: Device) -> tuple[SectionKey, VMState, State]:
    """Arguments for the DeviceSaver or DeviceLoader of this device."""
    key = SectionKey(device.name, device.instance_id)
    return key, device.vmstate, lambda: _state_of(machine, key)


def _state_of(machine: Machine, key: SectionKey) -> object:
    for device in machine.devices():
        if (device.name, device.instance_id) == key:
            return device.state
    raise MachineError(f"device {key} was there when the migration began, but the {machine.kind} machine has lost it")
