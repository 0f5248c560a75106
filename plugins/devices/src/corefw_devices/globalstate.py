"""The handler of section 'globalstate': what the engine stores in it and finds in it (CarriesRunState)."""

from __future__ import annotations

from typing import Final

from corefw.machine import RunState
from corefw.section import Coverage, SectionKey
from corefw.settings import Settings
from corefw.wire.globalstate import GLOBAL_STATE, SECTION, GlobalState
from corefw_devices.handler import DeviceHandler

COMES: Final = frozenset(RunState) - {RunState.INMIGRATE}
"""A guest that waits for itself would wait for ever, and none that has to be anywhere sends this."""


class GlobalStateHandler(DeviceHandler):
    """Sent always with property store-global-state, and else in any run state but running and paused."""

    def __init__(self, settings: Settings) -> None:
        state = GlobalState(COMES, always=settings.property("store-global-state"))
        super().__init__(SectionKey(SECTION, 0), GLOBAL_STATE, lambda: state)
        self._global = state

    def covers(self) -> Coverage:
        """Nothing: the run state is no device of the machine."""
        return Coverage()

    def store(self, run_state: RunState) -> None:
        self._global.runstate = run_state.value

    def run_state(self) -> RunState | None:
        return RunState(self._global.runstate) if self._global.received else None
