"""The devices plugin: one handler for each device and one for the run state, and both keep the contract."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import corefw_devices
import pytest
from corefw_devices.globalstate import GlobalStateHandler
from corefw_devices.handler import DeviceHandler

from corefw.errors import MachineError, RemoteStreamError
from corefw.machine import Device, Machine, RamBlock, RunState, StreamFormat, WaitReadable
from corefw.plugins import Plugins
from corefw.section import Priority, SectionHandler, SectionKey
from corefw.settings import Settings
from corefw.testing.handler import CHECKS, HandlerCase, check_handler
from corefw.wire.globalstate import CarriesRunState
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from corefw.wire.vmstate import Array, Buffer, Kind, Scalar, VMState

CLOCK = VMState(
    "clock",
    version_id=3,
    minimum_version_id=2,
    fields=(
        Scalar("time", Kind.U64),
        Array("alarms", 4, Kind.I32),
        Scalar("length", Kind.U16),
        Buffer("text", "length", limit=1000),
    ),
    subsections=(VMState("clock/zone", fields=(Scalar("zone", Kind.I8),), needed=lambda clock: clock.zone != 0),),
)
FOOTER = b"\x7e\0\0\0\7\0"


def clock(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"time": 0, "alarms": [0] * 4, "length": 0, "text": b"", "zone": 0} | values))


class Panel(Machine):
    """A machine that is all devices: nothing runs, there is no RAM."""

    kind = "panel"
    name = "panel-1"
    run_state = RunState.PAUSED

    def __init__(self, *devices: Device) -> None:
        self.present = list(devices)

    def ram_blocks(self) -> Sequence[RamBlock]:
        return ()

    def devices(self) -> Sequence[Device]:
        return tuple(self.present)

    def start(self) -> None:
        raise MachineError("a panel does not run")

    def stop(self, state: RunState) -> None:
        self.run_state = state

    def set_run_state(self, state: RunState) -> None:
        self.run_state = state

    def watch(self, observer: Callable[[RunState, RunState], None]) -> None:
        """It changes only when it is told to, and nobody here asks."""

    def information(self) -> Mapping[str, object]:
        return {"ram": {}}

    def close(self) -> None:
        self.present.clear()


class ParkedPanel(Panel):
    """One that keeps streams (AdoptsStreams)."""

    def adopt_sections(self, name: str, stream_format: StreamFormat, reader: StreamReader, live: WaitReadable) -> None:
        raise MachineError("nothing is parked in this test")

    def stored_format(self) -> StreamFormat | None:
        return None

    def stored_sections(self) -> Sequence[bytes]:
        return ()


def handlers(machine: Machine, settings: Settings | None = None) -> dict[SectionKey, SectionHandler]:
    plugins = Plugins()
    plugins.register(corefw_devices, "devices")
    return {one.key: one for one in plugins.section_handlers(machine, settings or Settings())}


def device_handler(table: VMState, state: object) -> DeviceHandler:
    key = SectionKey("clock", 0)
    found = handlers(Panel(Device("clock", 0, table, state)))[key]
    assert isinstance(found, DeviceHandler)
    return found


# -- the hook ------------------------------------------------------------------------------------------------------


def test_a_section_for_each_device_and_the_run_state() -> None:
    machine = Panel(Device("clock", 0, CLOCK, clock()), Device("clock", 1, CLOCK, clock()))
    assert list(handlers(machine)) == [("globalstate", 0), ("clock", 0), ("clock", 1)]


def test_machine_that_stores_streams_has_its_run_state_in_them() -> None:
    machine = ParkedPanel(Device("clock", 0, CLOCK, clock()))
    assert list(handlers(machine)) == [("clock", 0)]


def test_installed_as_a_plugin() -> None:
    plugins = Plugins.load()
    assert "devices" not in plugins.failures
    assert SectionKey("globalstate", 0) in {one.key for one in plugins.section_handlers(Panel(), plugins.settings())}


# -- devices -------------------------------------------------------------------------------------------------------

FULL = {"time": 2**63, "alarms": [1, -1, 2**31 - 1, 0], "length": 5, "text": b"hello", "zone": -3}


@pytest.mark.parametrize("check", CHECKS)
def test_device_keeps_the_contract(check: str) -> None:
    check_handler(
        HandlerCase(
            source=lambda: device_handler(CLOCK, clock(**FULL)),
            destination=lambda: device_handler(CLOCK, clock()),
        ),
        only=[check],
    )


def test_versions_and_priority_come_from_the_table() -> None:
    handler = device_handler(CLOCK, clock())
    assert (handler.version_id, handler.minimum_version, handler.priority) == (3, 2, Priority.DEVICES)
    late = device_handler(VMState("clock", priority=Priority.LATE), clock())
    assert (late.version_id, late.minimum_version, late.priority) == (1, 1, Priority.LATE)


def test_table_says_whether_the_section_is_needed_and_required() -> None:
    always = device_handler(CLOCK, clock())
    assert (always.needed(), always.required()) == (True, True)
    sometimes = VMState("clock", needed=lambda state: state.time > 0)
    assert [device_handler(sometimes, clock(time=time)).needed() for time in (0, 1)] == [False, True]
    assert not device_handler(sometimes, clock()).required()


def test_device_that_cannot_migrate_says_why() -> None:
    assert device_handler(CLOCK, clock()).blocked() is None
    held = device_handler(VMState("clock", unmigratable="it shows this host's time (unplug it first)"), clock())
    assert held.blocked() == "'clock': it shows this host's time (unplug it first)"


def test_state_is_asked_for_when_it_is_sent() -> None:
    """A machine may make its devices' states when it stops."""
    machine = Panel(Device("clock", 0, CLOCK, clock(time=1)))
    handler = handlers(machine)[SectionKey("clock", 0)]
    assert isinstance(handler, DeviceHandler)
    machine.present[:] = [Device("clock", 0, CLOCK, clock(time=2))]
    sink = MemorySink()
    writer = StreamWriter(sink)
    handler.save(writer)
    writer.flush()
    assert sink.data[:8] == (2).to_bytes(8, "big")
    machine.present.clear()
    with pytest.raises(MachineError, match="device 'clock' \\(instance 0\\) was there when the migration began"):
        handler.save(writer)


def test_errors_name_the_section() -> None:
    handler = device_handler(CLOCK, clock())
    with pytest.raises(RemoteStreamError, match=r"^section 'clock' \(instance 0\): expected version 2 to 3"):
        handler.load(StreamReader(MemorySource(b"")), 4)


# -- the run state -------------------------------------------------------------------------------------------------


def global_state(run_state: RunState | None = None, *, stored_always: bool = True) -> GlobalStateHandler:
    settings = Settings()
    settings.set_property("store-global-state", stored_always)
    handler = handlers(Panel(), settings)[SectionKey("globalstate", 0)]
    assert isinstance(handler, GlobalStateHandler)
    assert isinstance(handler, CarriesRunState)
    if run_state is not None:
        handler.store(run_state)
    return handler


def body_of(handler: GlobalStateHandler) -> bytes:
    sink = MemorySink()
    writer = StreamWriter(sink)
    handler.save(writer)
    writer.flush()
    return bytes(sink.data)


def load(body: bytes) -> GlobalStateHandler:
    handler = global_state()
    handler.load(StreamReader(MemorySource(body + FOOTER)), 1)
    return handler


@pytest.mark.parametrize("check", CHECKS)
def test_run_state_keeps_the_contract(check: str) -> None:
    check_handler(HandlerCase(source=lambda: global_state(RunState.PAUSED), destination=global_state), only=[check])


@pytest.mark.parametrize("run_state", sorted(set(RunState) - {RunState.INMIGRATE}))
def test_run_state_arrives(run_state: RunState) -> None:
    body = body_of(global_state(run_state))
    assert body == (len(run_state) + 1).to_bytes(4, "big") + run_state.encode().ljust(100, b"\0")
    handler = global_state()
    assert handler.run_state() is None
    handler.load(StreamReader(MemorySource(body + FOOTER)), 1)
    assert handler.run_state() is run_state


def test_description_is_qemus() -> None:
    handler = global_state(RunState.RUNNING)
    body_of(handler)
    assert handler.describe() == {
        "vmsd_name": "globalstate",
        "version": 1,
        "fields": [{"name": "size", "type": "uint32", "size": 4}, {"name": "runstate", "type": "buffer", "size": 100}],
    }


@pytest.mark.parametrize("run_state", RunState)
def test_without_store_global_state_only_unusual_states_are_sent(run_state: RunState) -> None:
    usual = run_state in (RunState.RUNNING, RunState.PAUSED)
    handler = global_state(run_state, stored_always=False)
    assert handler.needed() is not usual
    assert not handler.required()


def test_what_stands_behind_the_nul_is_free() -> None:
    """QEMU from 8.2 on has flags there."""
    assert load(b"\0\0\0\7paused\0".ljust(60, b"\1").ljust(104, b"\0")).run_state() is RunState.PAUSED


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\0\0\0\7parked\0".ljust(104, b"\0"), "expected one of the run states finish-migrate, "),
        (b"\0\0\0\7parked\0".ljust(104, b"\0"), "got 'parked' (at offset 104"),
        (b"\0\0\0\x0ainmigrate\0".ljust(104, b"\0"), "got 'inmigrate'"),
        (b"\0\0\0\1".ljust(104, b"\0"), "got ''"),
        (
            b"\0\0\0\x65".ljust(104, b"x"),
            "expected a run state's name of at most 99 bytes, got 100 bytes without a NUL",
        ),
        (b"\0\0\0\6paused\0".ljust(104, b"\0"), "expected size 7 for run state b'paused', got size 6"),
        (b"\0\0\0\3\xff\xfe\0".ljust(104, b"\0"), "section 'globalstate' (instance 0): expected one of the run states"),
    ],
)
def test_wrong_run_state_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(RemoteStreamError, match=re.escape(says)):
        load(body)
