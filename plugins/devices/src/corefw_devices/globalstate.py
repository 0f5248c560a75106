"""The saver and the loader of section 'globalstate': the run state of the source's guest."""

from __future__ import annotations

from typing import Final

from corefw.machine import RunState
from corefw.section import Coverage, RunStateLoader, RunStateSaver, SectionKey
from corefw.settings import Settings
from corefw.wire.globalstate import GLOBAL_STATE, SECTION, GlobalState
from corefw_devices.device import DeviceLoader, DeviceSaver

COMES: Final = frozenset(RunState) - {RunState.INMIGRATE}
"""Run states that a stream may have. A guest in `inmigrate` would never leave it."""


class GlobalStateSaver(DeviceSaver, RunStateSaver):
    """Sends the run state: always with property store-global-state, otherwise unless it is running or paused."""

    def __init__(self, settings: Settings) -> None:
        state = GlobalState(COMES, always=settings.property("store-global-state"))
        super().__init__(SectionKey(SECTION, 0), GLOBAL_STATE, lambda: state)
        self._global = state

    def covers(self) -> Coverage:
        """Nothing: the run state is not a device of the machine."""
        return Coverage()

    def store(self, run_state: RunState) -> None:
        self._global.runstate = run_state.value


class GlobalStateLoader(DeviceLoader, RunStateLoader):
    def __init__(self) -> None:
        state = GlobalState(COMES, always=False)
        super().__init__(SectionKey(SECTION, 0), GLOBAL_STATE, lambda: state)
        self._global = state

    def covers(self) -> Coverage:
        """Nothing: the run state is not a device of the machine."""
        return Coverage()

    def run_state(self) -> RunState | None:
        return RunState(self._global.runstate) if self._global.received else None
